"""What depends on the kind of device that a step runs on."""

from __future__ import annotations

import torch
from torch import Tensor

SYNCHRONOUS = frozenset({"cpu"})


def is_synchronous(device: torch.device) -> bool:
    """Whether an operator's work is done, and its errors are raised, when it returns.

    A GPU's kernels leave flags on the device, and the host that reads them waits for the device.
    """
    return device.type in SYNCHRONOUS


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor is being captured into a CUDA graph."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):  # torch asks the current device's stream
        return torch.cuda.is_current_stream_capturing()
