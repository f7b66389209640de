"""One step of one bucket, sparse or dense: send, then wait, then finish with the agreed verdict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmc_cuda import ops, reference
from gmc_cuda.buckets import Bucket
from gmc_cuda.exchange import Exchange


class SparseStep:
    """Compresses a bucket and gathers the payloads of all ranks.

    Args:
        rule: keyword arguments of ``ops.compress_`` that say how v is made.
        masking: DGC's momentum factor masking.
    """

    def __init__(
        self,
        bucket: Bucket,
        exchange: Exchange,
        k: int,
        rule: dict[str, Any],
        wire_dtype: torch.dtype,
        masking: bool,
    ) -> None:
        self.bucket, self.k, self.wire_dtype, self.masking = bucket, k, wire_dtype, masking
        self.payload = ops.compress_(
            bucket.memory,
            bucket.flat_grads(),
            k,
            params=bucket.flat_params(),
            aggregate=bucket.sparse_aggregate(),
            momentum_buffer=bucket.momentum_buffer,
            wire_dtype=wire_dtype,
            state=bucket.select_state(k),
            **rule,
        )
        self.payloads, self._work = exchange.all_gather(self.payload)
        self.nbytes = self.payload.numel()

    def wait(self) -> None:
        self._work.wait()

    def nonfinite(self) -> Tensor:
        """Every rank's count of non-finite values, int64 [p]."""
        counts = self.payloads[:, 4:8].contiguous().view(torch.int32).view(-1)
        return counts.to(torch.int64) & 0xFFFFFFFF

    def merge(self, skip: Tensor) -> None:
        self.aggregate = ops.merge(
            self.payloads, self.bucket.numel, self.k, self.wire_dtype, skip=skip
        )

    def give_back(self, skip: Tensor | None = None) -> None:
        """Returns what was taken from memory, if the step is skipped (None: it is)."""
        ops.restore_(self.bucket.memory, self.payload, self.k, self.wire_dtype, skip=skip)

    def finish(self, lr: float | Tensor, skip: Tensor) -> None:
        bucket = self.bucket
        ops.apply_(bucket.flat_params(), self.aggregate, lr, skip=skip)
        self.give_back(skip)
        if bucket.momentum_buffer is None:
            bucket.keep_aggregate(self.aggregate)
        elif self.masking:
            ops.mask_(bucket.momentum_buffer, self.payload, self.k, self.wire_dtype, skip=skip)


class DenseStep:
    """Sums v itself over all ranks, with the count of non-finite values as one more element."""

    def __init__(self, bucket: Bucket, exchange: Exchange, rule: dict[str, Any]) -> None:
        self.bucket = bucket
        self.factor = torch.tensor(1 / exchange.size, dtype=torch.float32)
        value, buffer, nonfinite = reference.accumulate(
            bucket.memory,
            bucket.flat_grads(),
            params=bucket.flat_params(),
            aggregate=bucket.dense_aggregate(),
            momentum_buffer=bucket.momentum_buffer,
            **rule,
        )
        # Until the verdict is known nothing is sent: memory holds all of v.
        bucket.memory.copy_(value)
        if buffer is not None:
            bucket.momentum_buffer.copy_(buffer)
        counts = torch.zeros(exchange.size, device=bucket.device)
        counts[exchange.rank] = nonfinite.clamp(max=2**24)
        self.total = torch.cat([value, counts])
        self._work = exchange.all_reduce(self.total)
        self.nbytes = 4 * self.total.numel()

    def wait(self) -> None:
        self._work.wait()

    def nonfinite(self) -> Tensor:
        """Every rank's count of non-finite values, int64 [p]."""
        return self.total[self.bucket.numel :].to(torch.int64)

    def merge(self, skip: Tensor) -> None:
        mean = self.total[: self.bucket.numel].mul_(self.factor)
        self.aggregate = _unless(skip, mean)

    def give_back(self) -> None:
        """Memory holds all of v until finish()."""

    def finish(self, lr: float | Tensor, skip: Tensor) -> None:
        bucket = self.bucket
        # Memory holds all of v: the whole of it was sent, or, if the step is skipped, nothing.
        bucket.memory.sub_(_unless(skip, bucket.memory))
        moves = (self.aggregate * lr).split(bucket.sizes)
        for param, move in zip(bucket.flat_params(), moves, strict=True):
            param.sub_(move.view(param.shape))
        if bucket.momentum_buffer is None:
            bucket.keep_aggregate(self.aggregate)


def _unless(skip: Tensor, values: Tensor) -> Tensor:
    """values, or zeros if the step is skipped; without making the host wait for a CUDA device."""
    if skip.is_cpu:
        return torch.zeros_like(values) if skip.item() else values
    return torch.where(skip != 0, 0.0, values)


Step = SparseStep | DenseStep


def start(
    bucket: Bucket,
    exchange: Exchange,
    k: int,
    rule: dict[str, Any],
    wire_dtype: torch.dtype,
    masking: bool,
) -> Step:
    """Starts a bucket's step the cheaper way."""
    nbytes = ops.payload_nbytes(bucket.numel, k, wire_dtype)
    if exchange.sends_dense(bucket.numel, k, nbytes):
        return DenseStep(bucket, exchange, rule)
    return SparseStep(bucket, exchange, k, rule, wire_dtype, masking)


def agree(steps: list[Step]) -> Tensor:
    """The verdict over all buckets, int32 [1], as of ``ops.verdict``."""
    payloads = [step.payloads for step in steps if isinstance(step, SparseStep)]
    flags = [ops.verdict(payloads)] if payloads else []
    for step in steps:
        if isinstance(step, DenseStep):
            flags.append(step.nonfinite().any().to(torch.int32).view(1))
    skip = flags[0]
    for flag in flags[1:]:
        skip = skip | flag
    return skip
