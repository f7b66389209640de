"""Fingerprints of parameters, which tell differing replicas apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_ROW = 4096  # elements that share one set of weights
_ROWS = 256  # rows at a time: their products take 8 MB
# Two large odd numbers without a pattern in their bits.
_ELEMENT, _ROW_FACTOR = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def fingerprints(params: Sequence[Tensor]) -> Tensor:
    """A number for each tensor, in which every bit and its place counts.

    It is the sum over all elements of weight times bits, modulo 2**64. The weights are odd, so that
    one changed element always changes the sum. They are powers of large numbers, so that several
    changes cancel each other by chance alone. CPU and CUDA give the same.

    Args:
        params: contiguous float32, bfloat16 or float16 tensors, all on one device.

    Returns:
        int64 [len(params)] on their device.
    """
    return torch.stack([_fingerprint(param.detach().reshape(-1)) for param in params])


def _fingerprint(values: Tensor) -> Tensor:
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    weights = _powers(_ELEMENT, _ROW, values.device)
    if bits.numel() <= _ROW:
        return (bits * weights[: bits.numel()]).sum()
    whole = bits.numel() // _ROW * _ROW
    sums = [(rows * weights).sum(1) for rows in bits[:whole].view(-1, _ROW).split(_ROWS)]
    sums.append((bits[whole:] * weights[: bits.numel() - whole]).sum().view(1))
    of_rows = torch.cat(sums)
    return (of_rows * _powers(_ROW_FACTOR, of_rows.numel(), values.device)).sum()


@cache
def _powers(base: int, n: int, device: torch.device) -> Tensor:
    """base, base**2, ... base**n modulo 2**64, int64 [n]."""
    return torch.full((n,), base, dtype=torch.int64, device=device).cumprod(0)
