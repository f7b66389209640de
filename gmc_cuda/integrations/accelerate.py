"""GMC inside Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmc_cuda.ddp import local_gradients
from gmc_cuda.integrations import settle


def leave_gradients_to_optimizer(accelerator: Accelerator, *models: nn.Module) -> None:
    """Call it once after ``prepare()``: DDP stays silent, and ``save_state()`` averages memory.

    ::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        leave_gradients_to_optimizer(accelerator, model)

    ``accumulate()``, ``clip_grad_norm_()`` (of each worker's own gradient), ``save_state()`` and
    ``load_state()`` work as with other optimizers.

    Args:
        models: what ``prepare()`` returned for the models.
    """
    for model in models:
        if isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
            local_gradients(model)

    def before_saving(models: Any, weights: Any, folder: str) -> None:
        for optimizer in accelerator._optimizers:
            settle(optimizer)

    accelerator.register_save_state_pre_hook(before_saving)
