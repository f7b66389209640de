"""GMC inside Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmc_cuda.ddp import local_gradients
from gmc_cuda.integrations import refuse_with_overlap, settle


def leave_gradients_to_optimizer(accelerator: Accelerator, *models: nn.Module) -> None:
    """Call it once after ``prepare()``: DDP stays silent, and ``save_state()`` averages memory.

    ::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        leave_gradients_to_optimizer(accelerator, model)

    ``accumulate()``, ``clip_grad_norm_()`` (of each worker's own gradient), ``save_state()`` and
    ``load_state()`` work as with other optimizers.

    Args:
        models: what ``prepare()`` returned for the models.

    Raises:
        ValueError: accumulation, or later clipping, with an optimizer that has overlap=True.
    """
    steps = accelerator.gradient_accumulation_steps
    for optimizer in accelerator._optimizers:
        refuse_with_overlap(optimizer, {"gradient_accumulation_steps": (steps, steps > 1)})
    for model in models:
        if isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
            local_gradients(model)
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, _refusing(accelerator, name))

    def before_saving(models: Any, weights: Any, folder: str) -> None:
        for optimizer in accelerator._optimizers:
            settle(optimizer)

    accelerator.register_save_state_pre_hook(before_saving)


def _refusing(accelerator: Accelerator, name: str) -> Any:
    """The accelerator's method, which would find no gradients where they are sent already."""
    clip = getattr(accelerator, name)

    def clip_what_is_there(parameters: Any, limit: float, *args: Any, **kwargs: Any) -> Any:
        for optimizer in accelerator._optimizers:
            refuse_with_overlap(optimizer, {f"accelerator.{name}": (limit, True)})
        return clip(parameters, limit, *args, **kwargs)

    return clip_what_is_there
