"""Loss scaling with a communication hook, where the scaler calls another optimizer than ours."""

from __future__ import annotations

import gc

import torch
from torch import Tensor


def only_grad_scaler() -> torch.amp.GradScaler | None:
    """The GradScaler that scales losses in this process; None if there is none.

    Raises:
        ValueError: there are several.
    """
    scalers = [
        found
        for found in gc.get_objects()  # a gradient has no reference to the scaler of its loss
        if issubclass(type(found), torch.amp.GradScaler)
        and found.is_enabled()
        and found._scale is not None  # it has scaled a loss
    ]
    if len(scalers) > 1:
        raise ValueError(
            f"grad_scaler: got None where {len(scalers)} GradScalers scale losses, must say which "
            "one is this model's: GMCHookState(grad_scaler=scaler)"
        )
    return scalers[0] if scalers else None


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """The present scale of the loss, one number on the device; None without scaling."""
    if scaler is None or not scaler.is_enabled() or scaler._scale is None:
        return None
    return scaler._scale.to(device)
