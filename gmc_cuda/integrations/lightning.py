"""GMC inside Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from gmc_cuda.ddp import local_gradients
from gmc_cuda.integrations import refuse_with_overlap, settle


class GMCStrategy(DDPStrategy):
    """DDPStrategy that leaves the gradients to the optimizer, and averages memory before a save.

    ::

        trainer = lightning.Trainer(strategy=GMCStrategy(), devices=2, gradient_clip_val=1.0)

    with a GMC or DGC in ``configure_optimizers``. Arguments: those of DDPStrategy. Gradient
    clipping clips each worker's own gradient.

    Raises:
        ValueError: clipping or accumulation with an optimizer that has overlap=True.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        local_gradients(self.model)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        clipping, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        for optimizer in self.optimizers:
            refuse_with_overlap(
                optimizer,
                {
                    "gradient_clip_val": (clipping, bool(clipping)),
                    "accumulate_grad_batches": (batches, batches > 1),
                },
            )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        for optimizer in self.optimizers:
            settle(optimizer)  # before the parameters are read, which a LocalUpdates changes
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        settle(optimizer)
        return super().optimizer_state(optimizer)
