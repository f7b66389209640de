"""One step of one bucket with two-sided compression: towards the owners of its ranges, and back.

    worker k:  v_k = u_k + g_k,                              c_kj = top-K of v_k in range j,
               u_k = v_k - c_k                               sent to owner j
    owner j:   s_j = r_j + beta * a_{t-1} + (1/p) sum_k c_kj,    d_j = top-K of s_j,
               r_j = s_j - d_j                               sent to all
    all:       a_t = all d_j side by side,                   w = w - lr * a_t

With r beside the mean of all u the equations of the papers hold as they do for an all-gather, and
each link carries (p-1)/p of two payloads, however many workers there are. The global momentum is
added by the owner: a worker need not spend entries on what all know. Local momentum (DGC) is each
worker's, as ever.

A payload that has arrived at its owner stays with it, also where the step is skipped then; only
what owners sent is taken back. What was sent to an owner that could not use it returns to the
sender's memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine import missing
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.exchange import Exchange, Work
from gmc_cuda._engine.owner import Owner
from gmc_cuda._engine.ranges import slices, within
from gmc_cuda._engine.rules import Part, Plan
from gmc_cuda._engine.steps import (
    Sent,
    Step,
    Target,
    empty_payload,
    insist,
    insist_once,
    look_back,
    moved_lr,
    raise_first,
    taken_back,
    use_on_this_stream,
)  # fmt: skip


def two_sided_step(
    bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan
) -> Step:
    """As :func:`steps.sparse_step`, with one more yield, of what the owners send to all."""
    mine, own, owner = plan.parts, plan.parts[exchange.rank], bucket.owner
    assert owner is not None
    wire_dtype, absent = plan.wire_dtype, missing.absent_in(grads)
    payloads = _towards_owners(bucket, grads, plan)
    owning = _Owning(bucket, owner, absent, plan, own)
    rows: list[Tensor] = []  # d_j of every owner
    back = Work()
    applied = False
    try:
        received, work = exchange.all_to_all(payloads, own.nbytes)
        skip = yield Sent(work, (received,), None, two_sided=True)
        use_on_this_stream(received, *payloads)
        called_off = None if skip.is_cpu else skip & (ops.MISMATCH | ops.OFF)
        failed = owning.reply(received, skip)
        gathered, back = exchange.all_gather(_padded(owning.payload, mine[0].nbytes))
        rows = [row[: part.nbytes] for row, part in zip(gathered, mine, strict=True)]
        skip = yield Sent(back, _by_size(gathered, mine), None, error=failed)
        use_on_this_stream(gathered)
        errors: list[BaseException] = []
        aggregate, its_own = insist(
            lambda: _side_by_side(rows, mine, exchange.rank, bucket, wire_dtype, skip), errors
        )
        target: Target = yield aggregate

        def move() -> None:
            ops.apply_(
                target.params,
                aggregate,
                moved_lr(plan, target.lr),
                skip=skip,
                skipped_steps=target.skipped_steps,
                flags=target.flags,
            )

        def mask() -> None:
            if bucket.momentum_buffer is None or not plan.masking:
                return
            for part, payload in zip(mine, payloads, strict=True):
                ops.mask_(
                    bucket.momentum_buffer[part.begin : part.end], payload, part.k, wire_dtype,
                    skip=skip,
                )  # fmt: skip

        def keep() -> None:
            if bucket.momentum_buffer is None:
                bucket.keep_aggregate(aggregate)
                owner.keep(its_own, bucket.aggregate)

        insist_once(lambda: look_back(target, bucket.sparse_aggregate, plan, skip), errors)
        insist_once(move, errors)
        applied = True
        insist_once(lambda: owning.take_back(skip), errors)
        if called_off is not None:  # a GPU's host has not read the verdict and raised
            insist_once(lambda: _give_back(bucket, mine, payloads, plan, called_off), errors)
        insist_once(mask, errors)
        insist_once(keep, errors)
    finally:
        if not applied:
            replies = rows if back.arrived else None
            insist(lambda: owning.cancel(payloads, mine, replies), [])
            taken_back(bucket)
    raise_first(errors)


def _towards_owners(bucket: Bucket, grads: list[Tensor | None], plan: Plan) -> list[Tensor]:
    """Compresses each range by itself: c_kj for every owner j, as payloads.

    Each header has the count of non-finite values in the whole bucket, so that every owner knows
    all that the workers have met.
    """
    arguments = plan.arguments
    if bucket.momentum_buffer is None:
        arguments = {**arguments, "momentum": 0.0}
    payloads: list[Tensor] = []
    with missing.left_alone(bucket, grads, arguments, momentum=False) as (arguments, params, _):
        for part in plan.parts:

            def compress(part: Part = part) -> Tensor:
                place = slice(part.begin, part.end)
                buffer = bucket.momentum_buffer
                return ops.compress_(
                    bucket.memory[place],
                    slices(grads, bucket.sizes, part.range),
                    part.k,
                    params=None if params is None else slices(params, bucket.sizes, part.range),
                    momentum_buffer=None if buffer is None else buffer[place],
                    wire_dtype=plan.wire_dtype,
                    state=bucket.select_state(part.k, part.range),
                    tag=plan.tag,
                    **arguments,
                )

            # Once the first range is compressed, the others must be.
            payloads.append(insist(compress, []) if payloads else compress())
    _share_counts(payloads)
    return payloads


def _share_counts(payloads: Sequence[Tensor]) -> None:
    """Writes the sum of all headers' counts of non-finite values into each of them."""
    counts = [payload[4:8].view(torch.int32) for payload in payloads]
    total = torch.cat(counts).to(torch.int64).bitwise_and_(0xFFFFFFFF).sum()
    if total.is_cpu and not total:
        return
    total.clamp_(max=2**32 - 1)
    word = torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
    for count in counts:
        count.copy_(word)


class _Owning:
    """This worker's part as the owner of a range, and what undoes it."""

    def __init__(
        self, bucket: Bucket, owner: Owner, absent: list[int], plan: Plan, own: Part
    ) -> None:
        self._bucket, self._owner, self._absent = bucket, owner, absent
        self._plan, self._own = plan, own
        self._has_momentum = False  # whether r has this step's momentum, and has decayed
        self._took_in = False  # whether r has what the workers have sent
        self.payload: Tensor | None = None

    def reply(self, received: Tensor, verdict: Tensor) -> Exception | None:
        """Takes in what has arrived and selects what goes to all, d_j.

        Args:
            received: the workers' payloads, uint8 [p, nbytes].
            verdict: of all of them.

        Returns:
            an error, where what has arrived cannot be used. The payload then calls the step off.
        """
        own, plan = self._own, self._plan
        stop = None if verdict.is_cpu else verdict & ~ops.NONFINITE
        try:
            merged = ops.merge(received, own.numel, own.k, plan.wire_dtype, skip=stop)
            self._add_momentum()
            self.payload = insist(lambda: self._select(merged, verdict), [])
        except Exception as error:
            self.payload = empty_payload(
                own.numel, own.k, plan.wire_dtype, ops.CALLED_OFF, received.device
            )
            return error
        self._took_in = True
        return None

    def _select(self, merged: Tensor, verdict: Tensor) -> Tensor:
        owner, own = self._owner, self._own
        return ops.compress_(
            owner.memory,
            [None],
            own.k,
            params=[owner.memory],
            momentum=1.0,
            aggregate=merged,
            found_inf=verdict.float(),  # so that all skip the step
            wire_dtype=self._plan.wire_dtype,
            state=self._bucket.select_state(own.k, None),
            tag=self._plan.tag,
        )

    def _add_momentum(self) -> None:
        """r = memory_decay * r + beta * a_{t-1}, but for parameters without a gradient here."""
        if self._has_momentum:
            return
        bucket, owner, rule = self._bucket, self._owner, self._plan.arguments
        absent = set(self._absent)
        if rule["memory_decay"] != 1:
            begin = 0
            for i, first, last in within(bucket.sizes, owner.range):
                if i not in absent:
                    owner.memory[begin : begin + last - first].mul_(rule["memory_decay"])
                begin += last - first
        aggregate = None
        if bucket.momentum_buffer is None and len(absent) < len(bucket.params):
            aggregate = owner.aggregate_of(bucket.aggregate, bucket.numel)
        if aggregate is not None and absent:
            dense, begin = ops.densify(aggregate, owner.range.numel), 0
            for i, first, last in within(bucket.sizes, owner.range):
                if i in absent:
                    dense[begin : begin + last - first] = 0.0
                begin += last - first
            aggregate = ops.sparsify(dense)
        if aggregate is not None:  # r - (-beta) a, each operation rounded to float32
            ops.apply_([owner.memory], aggregate, -rule["momentum"])
        self._has_momentum = True

    def take_back(self, skip: Tensor | None) -> None:
        """What was sent to all returns to r where the step is skipped; None: it is."""
        if self._took_in and self.payload is not None:
            ops.restore_(
                self._owner.memory, self.payload, self._own.k, self._plan.wire_dtype, skip=skip
            )

    def cancel(
        self, payloads: list[Tensor], parts: Sequence[Part], replies: list[Tensor] | None
    ) -> None:
        """Undoes a step that is not made: what owners have not taken in returns to memory."""
        bucket, owner = self._bucket, self._owner
        if not self._has_momentum:
            self._add_momentum()
        if self.payload is None:  # all owners have left the step here
            not_taken = [True] * len(parts)
        elif replies is None:  # the group was lost, and they are taken to have been faster
            not_taken = [False] * len(parts)
            not_taken[owner.rank] = not self._took_in
        else:
            tags = torch.stack([reply[20:24] for reply in replies]).view(torch.int32).flatten()
            not_taken = [tag == ops.CALLED_OFF for tag in tags.tolist()]
        for part, payload, back in zip(parts, payloads, not_taken, strict=True):
            if back:
                place = slice(part.begin, part.end)
                ops.restore_(bucket.memory[place], payload, part.k, self._plan.wire_dtype)
        self.take_back(None)


def _give_back(
    bucket: Bucket, parts: Sequence[Part], payloads: list[Tensor], plan: Plan, skip: Tensor
) -> None:
    for part, payload in zip(parts, payloads, strict=True):
        place = slice(part.begin, part.end)
        ops.restore_(bucket.memory[place], payload, part.k, plan.wire_dtype, skip=skip)


def _padded(payload: Tensor | None, nbytes: int) -> Tensor:
    assert payload is not None
    return torch.nn.functional.pad(payload, (0, nbytes - payload.numel()))


def _by_size(gathered: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Payloads of one size each, as ops.verdict takes them: those of the last range are shorter."""
    last = parts[-1].nbytes
    if last == gathered.size(1):
        return (gathered,)
    return gathered[:-1], gathered[-1:, :last]


def _side_by_side(
    rows: list[Tensor],
    parts: Sequence[Part],
    rank: int,
    bucket: Bucket,
    wire_dtype: torch.dtype,
    skip: Tensor,
) -> tuple[Tensor, Tensor]:
    """a_t, all d_j side by side, for the whole bucket and within this worker's own range."""
    dense = torch.zeros_like(bucket.memory)
    for j, (row, part) in enumerate(zip(rows, parts, strict=True)):
        aggregate = ops.merge(row.unsqueeze(0), part.numel, part.k, wire_dtype, skip=skip)
        ops.apply_([dense[part.begin : part.end]], aggregate, -1.0)
        if j == rank:
            own = aggregate
    return ops.sparsify(dense), own
