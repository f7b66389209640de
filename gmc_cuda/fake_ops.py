"""What each operator returns, without computing it: for torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import library  # noqa: F401  (loads the operators)

_ops = torch.ops.gmc_cuda


def compress_(
    memory: Tensor, grads: list[Tensor | None], k: int, *, wire_dtype: torch.dtype, **rest: Any
) -> Tensor:
    for i, grad in enumerate(grads):
        if grad is not None and grad.device != memory.device:
            raise ValueError(
                f"grads[{i}]: got device {grad.device}, must be {memory.device}, like memory"
            )
    return memory.new_empty(_ops.payload_nbytes(memory.numel(), k, wire_dtype), dtype=torch.uint8)


def accumulate_(memory: Tensor, grads: list[Tensor | None], *, ranks: int, **rest: Any) -> Tensor:
    return memory.new_empty(memory.numel() + ranks)


def unpack(
    payload: Tensor, numel: int, k: int, wire_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        payload.new_empty(k, dtype=torch.int64),
        payload.new_empty(k, dtype=torch.float32),
        payload.new_empty((), dtype=torch.int64),
    )


def verdict(payloads: list[Tensor], counts: list[Tensor]) -> Tensor:
    return (payloads or counts)[0].new_empty(1, dtype=torch.int32)


def payload_nonfinite(payloads: Tensor) -> Tensor:
    return payloads.new_empty(payloads.size(0), dtype=torch.int64)


def aggregate_flags(aggregates: list[Tensor]) -> Tensor:
    return aggregates[0].new_empty(len(aggregates), dtype=torch.int32)


def fingerprint(params: list[Tensor]) -> Tensor:
    return params[0].new_empty(len(params), dtype=torch.int64)


def merge(
    payloads: Tensor, numel: int, k: int, wire_dtype: torch.dtype, *, skip: Tensor | None = None
) -> Tensor:
    return payloads.new_empty(_ops.aggregate_nbytes(numel, k, payloads.size(0)))


def sparsify(dense: Tensor) -> Tensor:
    nbytes = _ops.aggregate_nbytes(dense.numel(), dense.numel(), 1)
    return dense.new_empty(nbytes, dtype=torch.uint8)


def densify(aggregate: Tensor, numel: int) -> Tensor:
    return aggregate.new_empty(numel, dtype=torch.float32)


def nothing(*args: Any, **options: Any) -> None:
    """For operators that only change their arguments."""


for fake in (
    compress_,
    accumulate_,
    unpack,
    verdict,
    payload_nonfinite,
    aggregate_flags,
    fingerprint,
    merge,
    sparsify,
    densify,
):
    torch.library.register_fake(f"gmc_cuda::{fake.__name__}", fake)
for name in ("apply_", "apply_dense_", "merge_", "restore_", "mask_"):
    torch.library.register_fake(f"gmc_cuda::{name}", nothing)
