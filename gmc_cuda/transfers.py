"""One step of one bucket, sparse or dense: send, then wait, then finish with the agreed verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gmc_cuda import ops, wire
from gmc_cuda.buckets import Bucket
from gmc_cuda.exchange import Exchange

Arguments = dict[str, Any]


class Transfer(Protocol):
    """A bucket's step on its way.

    Attributes:
        bucket: what it is about.
        nbytes: bytes that this worker put into the collective.
        payloads: every rank's payload, uint8 [p, n], for the verdict; None where v itself is sent.
        counts: every rank's count of non-finite values, float32 [p], where v itself is sent.
        aggregate: a_t, once merge() was called; empty for a skipped step.
    """

    bucket: Bucket
    nbytes: int
    aggregate: Tensor

    @property
    def payloads(self) -> Tensor | None: ...

    def wait(self) -> None:
        """Waits for the collective (on CUDA: makes the current stream wait)."""

    @property
    def counts(self) -> Tensor | None: ...

    def nonfinite(self) -> Tensor:
        """Every rank's count of non-finite values, int64 [p]."""

    def merge(self, skip: Tensor) -> None:
        """Makes the aggregate of what arrived. Changes no parameter."""

    def give_back(self) -> None:
        """Instead of finish(): what was taken from memory returns there, and a_t is zero."""

    def finish(
        self,
        params: Sequence[Tensor],
        lr: float | Tensor,
        skip: Tensor,
        skipped_steps: Tensor | None,
        flags: Tensor | None = None,
    ) -> None:
        """Does params -= lr * a_t and settles memory and momentum, or, if skipped, gives back.

        Args:
            params: what the update goes to: contiguous tensors in the bucket's order.
            skipped_steps: int64 [1], counted up in a skipped step; for one of its buckets.
            flags: int32 [1], gets ops.DAMAGED where a payload was damaged (CUDA); None: not asked.
        """


class SparseTransfer:
    """Compresses a bucket and gathers the payloads of all ranks.

    A parameter without a gradient on this worker is left alone by it: nothing is added to its
    memory, neither momentum nor weight decay. What is in its memory can still be sent.

    Args:
        grads: from ``bucket.flat_grads()``.
        arguments: keyword arguments of ``ops.compress_`` that say how v is made.
        masking: DGC's momentum factor masking.
        look_ahead: Nesterov's beta; None without.
    """

    def __init__(
        self,
        bucket: Bucket,
        exchange: Exchange,
        k: int,
        grads: list[Tensor | None],
        arguments: Arguments,
        wire_dtype: torch.dtype,
        masking: bool,
        look_ahead: float | Tensor | None,
    ) -> None:
        self._ahead = (look_ahead, arguments["momentum"])
        self.bucket, self.k, self.wire_dtype, self.masking = bucket, k, wire_dtype, masking
        absent = [i for i, grad in enumerate(grads) if grad is None]
        params = aggregate = None
        restore: Callable[[], None] | None = None
        if absent or arguments["weight_decay"] != 0:
            params = bucket.flat_params()
        if bucket.momentum_buffer is None:
            aggregate = bucket.sparse_aggregate()
        if absent and params is not None:
            if bucket.momentum_buffer is None:
                aggregate = _without(bucket, absent)
            else:
                restore = _set_aside(bucket, "momentum_buffer", absent)
            for i in absent:  # weight decay of zeros
                params[i] = torch.zeros_like(params[i])
        self.payload = ops.compress_(
            bucket.memory,
            grads,
            k,
            params=params,
            aggregate=aggregate,
            momentum_buffer=bucket.momentum_buffer,
            wire_dtype=wire_dtype,
            state=bucket.select_state(k),
            **arguments,
        )
        if restore is not None:
            restore()
        self.nbytes = self.payload.numel()
        try:
            self.payloads, self._work = exchange.all_gather(self.payload)
        except Exception:
            self.give_back()
            raise

    def wait(self) -> None:
        self._work.wait()
        _use_on_this_stream(self.payload, self.payloads)

    counts = None

    def nonfinite(self) -> Tensor:
        return ops.payload_nonfinite(self.payloads)

    def merge(self, skip: Tensor) -> None:
        bucket, ranks = self.bucket, self.payloads.size(0)
        spare = bucket.spare_aggregate(wire.aggregate_nbytes(bucket.numel, self.k, ranks))
        self.aggregate = ops.merge(
            self.payloads, bucket.numel, self.k, self.wire_dtype, skip=skip, out=spare
        )

    def give_back(self) -> None:
        ops.restore_(self.bucket.memory, self.payload, self.k, self.wire_dtype)
        self.bucket.aggregate = None

    def finish(
        self,
        params: Sequence[Tensor],
        lr: float | Tensor,
        skip: Tensor,
        skipped_steps: Tensor | None,
        flags: Tensor | None = None,
    ) -> None:
        bucket = self.bucket
        _look_ahead(params, bucket.sparse_aggregate, self._ahead, lr, skip)
        lr = _ahead_lr(self._ahead, lr)
        ops.apply_(
            params,
            self.aggregate,
            lr,
            skip=skip,
            skipped_steps=skipped_steps,
            flags=flags,
            memory=bucket.memory,
            payload=self.payload,
            k=self.k,
            wire_dtype=self.wire_dtype,
        )
        if bucket.momentum_buffer is None:
            bucket.keep_aggregate(self.aggregate)
        elif self.masking:
            ops.mask_(bucket.momentum_buffer, self.payload, self.k, self.wire_dtype, skip=skip)


class DenseTransfer:
    """Sums v itself over all ranks.

    Behind v travel each rank's count of non-finite values and, for each parameter, how many ranks
    have a gradient. A parameter that none has a gradient for is left alone, momentum and all, as by
    torch.optim.SGD; if some have one, the others count as zero.
    """

    payloads = None

    def __init__(
        self,
        bucket: Bucket,
        exchange: Exchange,
        grads: list[Tensor | None],
        arguments: Arguments,
        look_ahead: float | Tensor | None,
    ) -> None:
        self._ahead = (look_ahead, arguments["momentum"])
        self.bucket, self.ranks = bucket, exchange.size
        absent = [i for i, grad in enumerate(grads) if grad is None]
        self._absent = absent
        # What such a parameter has, should it turn out that nobody has a gradient for it.
        self._had = {
            name: [bucket.views(flat)[i].clone() for i in absent]
            for name, flat in bucket.vectors().items()
            if absent
        }
        self._previous = bucket.dense_aggregate() if bucket.momentum_buffer is None else None
        params = None
        if absent or arguments["weight_decay"] != 0:
            params = bucket.flat_params()
        self._total = ops.accumulate_(
            bucket.memory,
            grads,
            params=params,
            aggregate=self._previous,
            momentum_buffer=bucket.momentum_buffer,
            rank=exchange.rank,
            ranks=exchange.size + len(grads),
            **arguments,
        )
        present = self._total[bucket.numel + exchange.size :]
        present.fill_(1.0)
        for i in absent:
            present[i] = 0.0
        self._sent = self._total[: bucket.numel + exchange.size]
        self._present = present
        self._work = exchange.all_reduce(self._total)
        self.nbytes = 4 * self._total.numel()

    def wait(self) -> None:
        self._work.wait()
        _use_on_this_stream(self._total)

    @property
    def counts(self) -> Tensor:
        return self._sent[self.bucket.numel :]

    def nonfinite(self) -> Tensor:
        return self.counts.to(torch.int64)

    def merge(self, skip: Tensor) -> None:
        self.aggregate = self._total[: self.bucket.numel]

    def give_back(self) -> None:
        self.bucket.aggregate = None  # memory holds all of v until finish()

    def finish(
        self,
        params: Sequence[Tensor],
        lr: float | Tensor,
        skip: Tensor,
        skipped_steps: Tensor | None,
        flags: Tensor | None = None,
    ) -> None:
        bucket = self.bucket
        alone = [self._present[i] == 0 for i in self._absent]
        self._leave_alone(self.aggregate, alone, None)
        _look_ahead(params, lambda: self._known_before(alone), self._ahead, lr, skip)
        ops.apply_dense_(
            params,
            bucket.memory,
            self._sent,
            _ahead_lr(self._ahead, lr),
            skip=skip,
            skipped_steps=skipped_steps,
        )
        for name, flat in bucket.vectors().items():
            self._leave_alone(flat, alone, self._had.get(name))
        if bucket.momentum_buffer is None:
            if self._previous is not None and self._absent:
                views = bucket.views(self._previous)
                self._leave_alone(self.aggregate, alone, [views[i] for i in self._absent])
            bucket.keep_aggregate(self.aggregate)

    def _known_before(self, alone: list[Tensor]) -> Tensor | None:
        """a_{t-1} as apply_ takes it, but for parameters that are left alone."""
        if self._previous is None:
            return None
        previous = self._previous.clone()
        self._leave_alone(previous, alone, None)
        return ops.sparsify(previous)

    def _leave_alone(self, flat: Tensor, alone: list[Tensor], old: list[Tensor] | None) -> None:
        """Where nobody had a gradient, flat becomes what it was (None: zero). No host sync."""
        views = self.bucket.views(flat) if alone else []
        for n, i in enumerate(self._absent):
            before = 0.0 if old is None else old[n]
            views[i].copy_(torch.where(alone[n], before, views[i]))


def start(
    bucket: Bucket,
    exchange: Exchange,
    k: int,
    grads: list[Tensor | None],
    arguments: Arguments,
    wire_dtype: torch.dtype,
    masking: bool,
    look_ahead: float | Tensor | None = None,
) -> Transfer:
    """Starts a bucket's step the cheaper way.

    Args:
        arguments: keyword arguments of ``ops.compress_`` that say how v is made, and memory_decay.
    """
    decay = arguments["memory_decay"]
    arguments = {name: value for name, value in arguments.items() if name != "memory_decay"}
    if decay != 1:
        _decay(bucket, grads, decay)
    nbytes = wire.payload_nbytes(bucket.numel, k, wire_dtype)
    transfer: Transfer
    if wire.dense_is_cheaper(bucket.numel, k, nbytes, exchange.size):
        k = bucket.numel
        transfer = DenseTransfer(bucket, exchange, grads, arguments, look_ahead)
    else:
        transfer = SparseTransfer(
            bucket, exchange, k, grads, arguments, wire_dtype, masking, look_ahead
        )
    bucket.sent_nbytes, bucket.sent_entries = transfer.nbytes, k
    return transfer


def agree(transfers: list[Transfer]) -> Tensor:
    """The verdict over all buckets, int32 [1], as of ``ops.verdict``."""
    return ops.verdict(
        [t.payloads for t in transfers if t.payloads is not None],
        [t.counts for t in transfers if t.counts is not None],
    )


def raise_on(transfers: list[Transfer], skip: Tensor, rank: int, nonfinite: str) -> None:
    """Raises for a verdict that must not be passed over.

    Raises:
        RuntimeError: a damaged header arrived at this rank (CPU).
        FloatingPointError: with nonfinite="raise", on every rank.
    """
    if nonfinite != "raise" and not skip.is_cpu:
        return  # reading the verdict would make the host wait for the device
    verdict = int(skip)
    if verdict & ops.DAMAGED:
        raise RuntimeError(
            f"rank {rank} received a damaged payload header; the step was not made here, and "
            "replicas may differ: restart from a checkpoint"
        )
    if verdict and nonfinite == "raise":
        counts = torch.stack([t.nonfinite() for t in transfers]).sum(0).tolist()
        met = [f"{count} on rank {rank}" for rank, count in enumerate(counts) if count]
        raise FloatingPointError(
            f"non-finite gradient values: {', '.join(met)}; the step was not made, and the "
            "finite gradients stay in memory (nonfinite='skip' goes on without raising)"
        )


def cancel(transfers: list[Transfer]) -> None:
    """Ends a step of which nothing was applied: what was to be sent returns to memory."""
    for transfer in transfers:
        transfer.give_back()


def _decay(bucket: Bucket, grads: list[Tensor | None], decay: float) -> None:
    """u <- d * u, but where a parameter without a gradient is left alone."""
    if all(grad is not None for grad in grads):
        bucket.memory.mul_(decay)
        return
    for view, grad in zip(bucket.memory.split(bucket.sizes), grads, strict=True):
        if grad is not None:
            view.mul_(decay)


# Nesterov: w -= lr * ((1 + beta) a_t - beta' a_{t-1}), where beta' is the factor of a_{t-1} in v,
# that what was looked ahead is taken back. Each term is applied by itself.
_Ahead = tuple[float | Tensor | None, float | Tensor]


def _ahead_lr(ahead: _Ahead, lr: float | Tensor) -> float | Tensor:
    return lr if ahead[0] is None else lr * (1 + ahead[0])


def _look_ahead(
    params: Sequence[Tensor],
    previous: Callable[[], Tensor | None],
    ahead: _Ahead,
    lr: float | Tensor,
    skip: Tensor,
) -> None:
    """Takes back what the step before looked ahead."""
    aggregate = None if ahead[0] is None else previous()
    if aggregate is not None:
        ops.apply_(params, aggregate, -lr * ahead[1], skip=skip)


def _without(bucket: Bucket, absent: list[int]) -> Tensor | None:
    """a_{t-1} as compress_ takes it, without the entries of some parameters."""
    dense = bucket.dense_aggregate()
    if dense is None or len(absent) == len(bucket.params):
        return None
    dense = dense.clone()
    views = bucket.views(dense)
    for i in absent:
        views[i].zero_()
    return ops.sparsify(dense)


def _set_aside(bucket: Bucket, name: str, absent: list[int]) -> Callable[[], None]:
    """Zeroes some parameters' part of a vector; calling the result puts it back."""
    views = bucket.views(bucket.vectors()[name])
    kept = [views[i].clone() for i in absent]
    for i in absent:
        views[i].zero_()

    def restore() -> None:
        for i, old in zip(absent, kept, strict=True):
            views[i].copy_(old)

    return restore


def _use_on_this_stream(*tensors: Tensor) -> None:
    """With overlap they were made on the backward pass's stream, and are used and freed on this."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
