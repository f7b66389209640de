"""One step of one bucket with two-sided compression: towards the owners of its ranges, and back.

    worker k:  v_k = u_k + g_k,                              c_kj = top-K of v_k in range j,
               u_k = v_k - c_k                               sent to owner j
    owner j:   s_j = r_j + beta * a_{t-1} + (1/p) sum_k c_kj,    d_j = top-K of s_j,
               r_j = s_j - d_j                               sent to all
    all:       a_t = all d_j side by side,                   w = w - lr * a_t

With r added to the mean of all u, the equations of the papers hold as they do for an all-gather,
and each link carries (p-1)/p of two payloads, however many workers there are. The owner adds the
global momentum, so that no worker spends entries on what all workers know. Local momentum (DGC)
stays with each worker.

In a skipped step an owner keeps what it has received, in r, and only what it has sent returns to
r. A payload that its owner could not use returns to the sender's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine import missing, steps
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.exchange import Exchange, Work
from gmc_cuda._engine.ranges import slices, within
from gmc_cuda._engine.rules import Part, Plan
from gmc_cuda._engine.steps import CalledOff, Sent, Step, Target, insist, insist_once


def two_sided_step(
    bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan
) -> Step:
    """A step like :func:`steps.sparse_step`, with one more yield for what the owners send."""
    payloads = _towards_owners(bucket, grads, plan)
    owning = _Owning(bucket, missing.absent_in(grads), plan, exchange.rank)
    back = Work()
    replies: list[Tensor] = []  # d_j of every owner
    applied = False
    try:
        received, work = exchange.all_to_all(payloads, owning.part.nbytes)
        try:
            verdict = yield Sent(work, (received,), None, two_sided=True)
            steps.use_on_this_stream(received, *payloads)
            answer, error = owning.answer(received, verdict)
        except CalledOff as called_off:
            answer, error = owning.refuse(called_off.verdict), None
        sent = steps.send_answer(exchange, plan, answer, error)
        back, rows = sent.work, chain.from_iterable(sent.payloads)
        replies = [row[: part.nbytes] for part, row in zip(plan.parts, rows, strict=True)]
        skip = yield sent
        steps.use_on_this_stream(*sent.payloads)
        errors: list[BaseException] = []
        aggregate, own = insist(lambda: _side_by_side(bucket, replies, plan, skip), errors)
        target: Target = yield aggregate

        def move() -> None:
            ops.apply_(
                target.params,
                aggregate,
                steps.moved_lr(plan, target.lr),
                skip=skip,
                skipped_steps=target.skipped_steps,
                flags=target.flags,
            )

        def look_back() -> None:
            steps.look_back(target, bucket.sparse_aggregate, plan, skip)

        insist_once(look_back, errors)
        insist_once(move, errors)
        applied = True
        insist_once(lambda: owning.take_back(skip), errors)
        if not skip.is_cpu:  # on the CPU, calling a step off has raised before
            insist_once(lambda: owning.give_back(payloads, verdict), errors)
        insist_once(lambda: _mask(bucket, payloads, plan, skip), errors)
        insist_once(lambda: owning.keep(aggregate, own), errors)
    finally:
        if not applied:
            arrived = replies if back.arrived else None
            insist(lambda: owning.cancel(payloads, arrived), [])
            steps.taken_back(bucket)
    steps.raise_first(errors)


def _towards_owners(bucket: Bucket, grads: list[Tensor | None], plan: Plan) -> list[Tensor]:
    """Compresses each range by itself: the payloads c_kj for all owners j.

    Each header counts the non-finite values of the whole bucket, so that every owner knows of all.
    """
    arguments, buffer = plan.arguments, bucket.momentum_buffer
    if buffer is None:
        arguments = {**arguments, "momentum": 0.0}
    payloads: list[Tensor] = []
    with missing.left_alone(bucket, grads, arguments, by_range=True) as (arguments, params, _):
        for part in plan.parts:

            def compress(part: Part = part) -> Tensor:
                place = slice(part.begin, part.end)
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

            # After the first range has been compressed, the others must be too.
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


def _side_by_side(
    bucket: Bucket, replies: Sequence[Tensor], plan: Plan, skip: Tensor
) -> tuple[Tensor, Tensor | None]:
    """a_t (all d_j side by side) of the whole bucket, and within this worker's own range."""
    dense, own = torch.zeros_like(bucket.memory), None
    for j, (reply, part) in enumerate(zip(replies, plan.parts, strict=True)):
        aggregate = ops.merge(reply.unsqueeze(0), part.numel, part.k, plan.wire_dtype, skip=skip)
        ops.apply_([dense[part.begin : part.end]], aggregate, -1.0)
        if bucket.owner is not None and j == bucket.owner.rank:
            own = aggregate
    return ops.sparsify(dense), own


def _mask(bucket: Bucket, payloads: Sequence[Tensor], plan: Plan, skip: Tensor) -> None:
    """DGC's momentum factor masking."""
    if bucket.momentum_buffer is None or not plan.masking:
        return
    for part, payload in zip(plan.parts, payloads, strict=True):
        buffer = bucket.momentum_buffer[part.begin : part.end]
        ops.mask_(buffer, payload, part.k, plan.wire_dtype, skip=skip)


class _Owning:
    """The owner's side of a step, and what undoes it.

    Args:
        absent: indices of the bucket's parameters that have no gradient on this worker.
        rank: this worker's rank.

    Attributes:
        part: this worker's range, and what is sent of it.
    """

    def __init__(self, bucket: Bucket, absent: list[int], plan: Plan, rank: int) -> None:
        assert bucket.owner is not None
        self._bucket, self._owner, self._absent = bucket, bucket.owner, frozenset(absent)
        self._plan, self.part = plan, plan.parts[rank]
        self._has_momentum = False  # whether r has decayed and has this step's momentum
        self._took_in = False  # whether r has what the workers have sent
        self._none_took_in = True  # whether no owner has
        self._answer: Tensor | None = None

    def answer(self, received: Tensor, verdict: Tensor) -> tuple[Tensor, BaseException | None]:
        """Adds what has arrived to r, and selects what goes to all.

        Args:
            received: the workers' payloads, uint8 [p, nbytes].
            verdict: the verdict on all of them.

        Returns:
            The payload d_j, and the error if there was one, such as a damaged payload. The other
            workers wait for an answer, so after an error the payload calls the step off, or makes
            all skip it.
        """
        part, plan = self.part, self._plan
        self._none_took_in = False
        stop = None if verdict.is_cpu else verdict & ~ops.NONFINITE
        try:
            merged = ops.merge(received, part.numel, part.k, plan.wire_dtype, skip=stop)
            self._add_momentum()
            self._answer = insist(lambda: self._select(merged, verdict), [])
        except Exception as error:
            self._answer = self._nothing(ops.CALLED_OFF)
            return self._answer, error
        except BaseException as error:  # an interrupt, raised after an operator has done its work
            self._took_in = True
            self._answer = self._nothing(plan.tag, nonfinite=1)
            return self._answer, error
        self._took_in = True
        return self._answer, None

    def refuse(self, verdict: int) -> Tensor:
        """Calls the step off.

        Args:
            verdict: the verdict on what all workers have sent, which may have kept the owners from
                adding it to r.

        Returns:
            The payload to send.
        """
        self._none_took_in = bool(verdict & (ops.MISMATCH | ops.OFF))
        self._answer = self._nothing(ops.CALLED_OFF)
        return self._answer

    def _nothing(self, tag: int, nonfinite: int = 0) -> Tensor:
        part, device = self.part, self._owner.memory.device
        return steps.empty_payload(
            part.numel, part.k, self._plan.wire_dtype, tag, device, nonfinite
        )

    def _select(self, merged: Tensor, verdict: Tensor) -> Tensor:
        memory = self._owner.memory
        return ops.compress_(
            memory,
            [None],
            self.part.k,
            params=[memory],  # for its size
            momentum=1.0,
            aggregate=merged,
            found_inf=verdict.float(),  # so that all skip the step
            wire_dtype=self._plan.wire_dtype,
            state=self._bucket.select_state(self.part.k),
            tag=self._plan.tag,
        )

    def _add_momentum(self) -> None:
        """r = memory_decay * r + beta * a_{t-1}, except for parameters without a gradient here."""
        if self._has_momentum:
            return
        bucket, owner, rule = self._bucket, self._owner, self._plan.arguments
        if rule["memory_decay"] != 1:
            for i, piece in self._pieces(owner.memory):
                if i not in self._absent:
                    piece.mul_(rule["memory_decay"])
        aggregate = None
        if bucket.momentum_buffer is None and len(self._absent) < len(bucket.params):
            aggregate = owner.aggregate_of(bucket.aggregate, bucket.numel)
        if aggregate is not None and self._absent:
            dense = ops.densify(aggregate, owner.range.numel)
            for i, piece in self._pieces(dense):
                if i in self._absent:
                    piece.zero_()
            aggregate = ops.sparsify(dense)
        if aggregate is not None:  # r - (-beta) a, each operation rounded to float32
            ops.apply_([owner.memory], aggregate, -rule["momentum"])
        self._has_momentum = True

    def _pieces(self, flat: Tensor) -> list[tuple[int, Tensor]]:
        """Each parameter's index in the bucket, with its piece of a tensor of the range."""
        found = within(self._bucket.sizes, self._owner.range)
        pieces = flat.split([last - first for _, first, last in found])
        return [(i, piece) for (i, _, _), piece in zip(found, pieces, strict=True)]

    def take_back(self, skip: Tensor | None) -> None:
        """Returns what was sent to all to r if skip is not zero, or None."""
        if self._took_in and self._answer is not None:
            part, memory = self.part, self._owner.memory
            ops.restore_(memory, self._answer, part.k, self._plan.wire_dtype, skip=skip)

    def give_back(self, payloads: Sequence[Tensor], verdict: Tensor) -> None:
        """Returns to memory what no owner has added to r, as decided on the device."""
        called_off = verdict & (ops.MISMATCH | ops.OFF)
        for part, payload in zip(self._plan.parts, payloads, strict=True):
            self._return(part, payload, called_off)

    def _return(self, part: Part, payload: Tensor, skip: Tensor | None = None) -> None:
        memory = self._bucket.memory[part.begin : part.end]
        ops.restore_(memory, payload, part.k, self._plan.wire_dtype, skip=skip)

    def keep(self, aggregate: Tensor, own: Tensor | None) -> None:
        """Makes these a_{t-1} of the next step, with global momentum."""
        if self._bucket.momentum_buffer is None and own is not None:
            self._bucket.keep_aggregate(aggregate)
            self._owner.keep(own, self._bucket.aggregate)

    def cancel(self, payloads: Sequence[Tensor], replies: Sequence[Tensor] | None) -> None:
        """Undoes a step that is given up: what owners have not added to r returns to memory.

        Args:
            payloads: what this worker has sent to the owners.
            replies: what the owners have sent to all; None if it did not arrive.
        """
        self._add_momentum()
        if self._none_took_in:
            taken = [False] * len(payloads)
        elif replies is None:  # the group was lost: the other owners are assumed to have added it
            taken = [True] * len(payloads)
            taken[self._owner.rank] = self._took_in
        else:
            tags = torch.stack([reply[20:24] for reply in replies]).view(torch.int32).flatten()
            taken = [tag != ops.CALLED_OFF for tag in tags.tolist()]
        for part, payload, was_taken in zip(self._plan.parts, payloads, taken, strict=True):
            if not was_taken:
                self._return(part, payload)
        self.take_back(None)
