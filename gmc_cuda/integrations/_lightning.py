"""What the strategies for Lightning and Fabric add to DDPStrategy.

The same code comes in two packages: as lightning.pytorch and lightning.fabric, and as
pytorch_lightning and lightning_fabric. Their classes do not accept each other, so this module
imports neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakSet

from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda.integrations import (
    refuse_with_overlap,
    require_own,
    settle,
    share_scale,
    silence_ddp,
    unwrap,
)

Base: Any = object  # the subclasses add DDPStrategy, whose methods super() finds
SCALER = 'plugins=MixedPrecision("16-mixed", "cuda", scaler=gmc_cuda.GradScaler("cuda"))'


class TrainersStrategy(Base):
    """What GMCStrategy adds to a Trainer's DDPStrategy."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        silence_ddp(self.model)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        require_own(
            self.optimizers,
            "configure_optimizers",
            "return gmc_cuda.GMC(self.parameters(), lr=0.1)",
        )
        clipping, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        for optimizer in self.optimizers:
            refuse_with_overlap(
                optimizer,
                {
                    "gradient_clip_val": (clipping, bool(clipping)),
                    "accumulate_grad_batches": (batches, batches > 1),
                },
            )
        _refuse_to_clip(self.precision_plugin)
        scaler = getattr(self.precision_plugin, "scaler", None)
        share_scale(scaler, "trainer.precision_plugin.scaler", f"Trainer({SCALER})")

    def lightning_module_state_dict(self) -> Any:
        for optimizer in self.optimizers:
            settle(optimizer)  # first, because a LocalUpdates changes parameters
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> Any:
        settle(optimizer)
        return super().optimizer_state(optimizer)


def _refuse_to_clip(plugin: Any) -> None:
    """Makes a Trainer's precision plugin refuse to clip gradients that were sent already.

    ``LightningModule.clip_gradients()`` calls the plugin. Modules call it under manual
    optimization, or in their configure_gradient_clipping().
    """
    if "clip_gradients" in vars(plugin):  # replaced by an earlier fit()
        return
    clip = plugin.clip_gradients

    def clip_gradients(optimizer: Any, clip_val: Any = 0.0, *args: Any, **kwargs: Any) -> Any:
        refuse_with_overlap(optimizer, {"gradient_clip_val": (clip_val, clip_val > 0)})
        return clip(optimizer, clip_val, *args, **kwargs)

    plugin.clip_gradients = clip_gradients


class FabricsStrategy(Base):
    """What GMCFabricStrategy adds to Fabric's DDPStrategy."""

    _backward_sync_control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backward_sync_control = _NoSync(self._backward_sync_control)

    def setup_module(self, module: Any) -> Any:
        ddp = super().setup_module(module)
        silence_ddp(ddp)
        return ddp

    def setup_optimizer(self, optimizer: Any) -> Any:
        require_own(
            [optimizer],
            "the optimizer given to fabric.setup()",
            "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)",
        )
        scaler = getattr(self.precision, "scaler", None)
        share_scale(scaler, "fabric.strategy.precision.scaler", f"Fabric({SCALER})")
        self._backward_sync_control.optimizers.add(optimizer)
        return super().setup_optimizer(optimizer)

    def clip_gradients_norm(
        self, module: Any, optimizer: Any, max_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        refuse_with_overlap(optimizer, {"max_norm": (max_norm, True)})
        return super().clip_gradients_norm(module, optimizer, max_norm, *args, **kwargs)

    def clip_gradients_value(self, module: Any, optimizer: Any, clip_val: Any) -> Any:
        refuse_with_overlap(optimizer, {"clip_val": (clip_val, True)})
        return super().clip_gradients_value(module, optimizer, clip_val)

    def save_checkpoint(self, path: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        for value in state.values():
            settle(value)  # first, because a LocalUpdates changes parameters
        super().save_checkpoint(path, state, *args, **kwargs)


class _NoSync:
    """Makes fabric.no_backward_sync() also no_sync() of optimizers with overlap=True."""

    def __init__(self, of_ddp: Any) -> None:
        self.of_ddp = of_ddp
        self.optimizers: WeakSet[Any] = WeakSet()

    def no_backward_sync(self, module: Any, enabled: bool) -> AbstractContextManager[Any]:
        contexts = ExitStack()
        contexts.enter_context(self.of_ddp.no_backward_sync(module, enabled))
        of_module = set(module.parameters()) if enabled else set()
        for optimizer in self.optimizers:
            found = unwrap(optimizer)
            if isinstance(found, CompressedSGD) and found.overlap:
                params = (p for group in found.param_groups for p in group["params"])
                if not of_module.isdisjoint(params):
                    contexts.enter_context(found.no_sync())
        return contexts
