"""GMC inside Hugging Face Accelerate."""

from __future__ import annotations

from itertools import chain
from typing import Any

from accelerate import Accelerator
from torch import nn

from gmc_cuda._engine import ddp_guard
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda.integrations import (
    refuse_with_overlap,
    require_own,
    settle,
    share_scale,
    silence_ddp,
    unwrap,
)


def leave_gradients_to_optimizer(accelerator: Accelerator, *models: nn.Module) -> None:
    """Makes DDP leave the gradients to the optimizer. Call it once after ``prepare()``.

    ::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        leave_gradients_to_optimizer(accelerator, model)

    ``accumulate()``, ``clip_grad_norm_()`` (of each worker's own gradient), ``save_state()`` (which
    averages memory), ``load_state()`` and ``mixed_precision="fp16"`` then work as with other
    optimizers. The accelerator's GradScaler becomes a :class:`gmc_cuda.GradScaler`.

    Args:
        accelerator: the accelerator, after it has prepared model and optimizer.
        models: the models that ``prepare()`` returned. Default: all that its optimizers train.

    Raises:
        ValueError: no optimizer was prepared, or one that is not gmc_cuda's; or gradients are
            accumulated, or later clipped, with an optimizer that has overlap=True.
        TypeError: the GradScaler is of a class that is neither torch's nor gmc_cuda's.
    """
    if not accelerator._optimizers:
        raise ValueError(
            "accelerator: it has prepared no optimizer. Write, in this order,\n"
            "    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
            "    leave_gradients_to_optimizer(accelerator, model)"
        )
    require_own(
        accelerator._optimizers,
        "the optimizer given to accelerator.prepare()",
        "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)",
    )
    steps = accelerator.gradient_accumulation_steps
    for optimizer in accelerator._optimizers:
        refuse_with_overlap(optimizer, {"gradient_accumulation_steps": (steps, steps > 1)})
    share_accelerators_scale(accelerator, "accelerator")
    if not models:  # accelerator._models has the models as they were before DDP wrapped them
        groups = chain.from_iterable(o.param_groups for o in accelerator._optimizers)
        models = tuple(ddp_guard.over(p for group in groups for p in group["params"]))
    for model in models:
        silence_ddp(model)
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, _refusing(accelerator, name))

    def before_saving(models: Any, weights: Any, folder: str) -> None:
        for optimizer in accelerator._optimizers:
            settle(optimizer)

    accelerator.register_save_state_pre_hook(before_saving)


def share_accelerators_scale(accelerator: Any, name: str) -> None:
    """Makes the accelerator's scaler gmc_cuda's, and its optimizers notice skipped steps."""
    share_scale(
        accelerator.scaler,
        f"{name}.scaler",
        f'{name}.scaler = gmc_cuda.GradScaler("cuda")  # before prepare()',
    )
    for optimizer in accelerator._optimizers:
        found = unwrap(optimizer)
        if optimizer.scaler is not None and isinstance(found, CompressedSGD):
            _notice_skipped_steps(optimizer, found)


def _notice_skipped_steps(accelerated: Any, optimizer: CompressedSGD) -> None:
    """Makes Accelerate's ``step_was_skipped`` true after a step that all workers skipped.

    Accelerate takes a step as made if the scaler has called the optimizer. Here the scaler always
    does, because the workers decide inside step(); so the learning rate's schedule would go on.
    """
    known = accelerated._optimizer_patched_step_method

    def step(*args: Any, **kwargs: Any) -> Any:
        result = known(*args, **kwargs)
        skipped = optimizer.last_step_skipped()
        accelerated._accelerate_step_called = skipped is None or not skipped.item()
        return result

    accelerated._optimizer_patched_step_method = step


def _refusing(accelerator: Accelerator, name: str) -> Any:
    """The accelerator's method, refused with overlap=True, where gradients are sent already."""
    clip = getattr(accelerator, name)

    def clip_what_is_there(parameters: Any, limit: float, *args: Any, **kwargs: Any) -> Any:
        for optimizer in accelerator._optimizers:
            refuse_with_overlap(optimizer, {f"accelerator.{name}": (limit, True)})
        return clip(parameters, limit, *args, **kwargs)

    return clip_what_is_there
