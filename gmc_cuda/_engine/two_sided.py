"""One step of one bucket with two-sided compression: towards the owners of its ranges, and back.

    worker k:  v_k = u_k + g_k,                              c_kj = top-K of v_k in range j,
               u_k = v_k - c_k                               sent to owner j
    owner j:   s_j = r_j + beta * a_{t-1} + (1/p) sum_k c_kj,    d_j = top-K of s_j,
               r_j = s_j - d_j                               sent to all
    all:       a_t = all d_j side by side,                   w = w - lr * a_t

With r added to the mean of all u, the equations of the papers hold as they do for an all-gather,
and each link carries (p-1)/p of two payloads, however many workers there are. The owner adds the
global momentum, so that a worker need not spend entries on what all know. Local momentum (DGC) is
each worker's, as ever.

A payload that has arrived at its owner stays with it, even if the step is skipped then; only what
the owners have sent is taken back. What was sent to an owner that could not use it returns to the
sender's memory.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine import missing, steps
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.device import is_synchronous
from gmc_cuda._engine.exchange import Exchange, Work
from gmc_cuda._engine.ranges import within
from gmc_cuda._engine.rules import Plan
from gmc_cuda._engine.steps import CalledOff, Sent, Step, Target, insist, insist_once


def two_sided_step(
    bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan
) -> Step:
    """As :func:`steps.sparse_step`, with one more yield, of what the owners send to all."""
    errors: list[BaseException] = []
    owning = _Owning(bucket, missing.absent_in(grads), plan, exchange.rank)
    taken: list[Tensor] = []  # the payloads, once they are no longer in memory
    back: Work | None = None
    moved: list[None] = []
    try:
        with ops.noted(taken):
            payloads = _towards_owners(bucket, grads, plan)
        received, work = exchange.all_to_all(payloads, *plan.split(exchange.rank))
        try:
            verdict = yield Sent(work, (received,), None, two_sided=True)
            steps.use_on_this_stream(received, payloads)
            answer, error = owning.answer(received, verdict, errors)
        except CalledOff as called_off:
            answer, error = owning.refuse(called_off.verdict), None
        gathered, sent = insist(  # d_j of every owner
            lambda: steps.send_answer(exchange, plan, answer, error), errors
        )
        back = sent.work
        skip = yield sent._replace(unusable=owning.unusable)
        steps.use_on_this_stream(gathered)
        aggregate = insist(lambda: _merge(bucket.numel, gathered, plan, skip), errors)
        own = insist(lambda: owning.merge(skip), errors)
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
        insist_once(move, errors, moved)
        insist_once(lambda: owning.take_back(skip), errors)
        if owning.unusable is not None:  # otherwise a step that was called off has raised
            insist_once(lambda: owning.give_back(payloads, gathered), errors)
        insist_once(lambda: _mask(bucket, payloads, plan, skip), errors)
        insist_once(lambda: owning.keep(aggregate, own), errors)
    finally:
        if taken and not moved:
            answers = None if back is None or not back.arrived else gathered
            insist(lambda: steps.use_on_this_stream(*taken), [])
            insist_once(lambda: owning.return_what_was_left(taken[0], answers), [])
            insist_once(lambda: owning.take_back(None), [])
            steps.taken_back(bucket)
    steps.raise_first(errors)


def _towards_owners(bucket: Bucket, grads: list[Tensor | None], plan: Plan) -> Tensor:
    """Compresses each range by itself: c_kj for every owner j, one after the other.

    Each header has the count of non-finite values in the whole bucket, so that every owner knows
    all that the workers have met.
    """
    arguments, first = plan.arguments, plan.parts[0]
    if bucket.momentum_buffer is None:
        arguments = {**arguments, "momentum": 0.0}
    with missing.left_alone(bucket, grads, arguments, owned=True) as (arguments, params, _):
        return ops.compress_(
            bucket.memory,
            grads,
            first.k,
            params=params,
            momentum_buffer=bucket.momentum_buffer,
            wire_dtype=plan.wire_dtype,
            state=bucket.select_state(first.k, first.numel, len(plan.parts)),
            tag=plan.tag,
            **plan.ranges(),
            **arguments,
        )


def _merge(numel: int, gathered: Tensor, plan: Plan, skip: Tensor) -> Tensor:
    """a_t, all d_j side by side."""
    first, last = plan.parts[0], plan.parts[-1]
    return ops.merge_ranges(
        gathered, numel, first.numel, first.k, last.k, plan.wire_dtype, skip=skip
    )


def _mask(bucket: Bucket, payloads: Tensor, plan: Plan, skip: Tensor) -> None:
    """DGC's momentum factor masking."""
    if bucket.momentum_buffer is not None and plan.masking:
        k = plan.parts[0].k
        ops.mask_(bucket.momentum_buffer, payloads, k, plan.wire_dtype, skip=skip, **plan.ranges())


def _unusable(stop: Tensor, merged: Tensor) -> Tensor:
    """The bits of a verdict for which an owner cannot use what it has merged, int32 [1]."""
    return stop | steps.header_word(merged, steps.FLAGS) & ops.DAMAGED


def _call_off(answer: Tensor, condition: Tensor) -> None:
    """Makes an owner's answer call the step off if the condition, int32 [1], is not zero."""
    steps.header_word(answer, steps.TAG).masked_fill_(condition != 0, ops.CALLED_OFF)


class _Owning:
    """This worker's part of a step as the owner of a range, and what undoes the step.

    Args:
        absent: which parameters of the bucket have no gradient on this worker.
        rank: this worker's.

    Attributes:
        part: its range, and what is sent of that.
    """

    def __init__(self, bucket: Bucket, absent: list[int], plan: Plan, rank: int) -> None:
        assert bucket.owner is not None
        self._bucket, self._owner, self._absent = bucket, bucket.owner, frozenset(absent)
        self._plan, self.part = plan, plan.parts[rank]
        self._has_decayed = self._has_momentum = False  # whether r has, in this step
        # d_j, once r has what the workers have sent, without d_j.
        self._selected: list[Tensor] = []
        self._none_took_in = True  # whether no owner has taken that in
        self._answer: Tensor | None = None  # what is sent to all
        # Not zero: what has arrived could not be used, int32 [1]. None where that raises.
        self.unusable: Tensor | None = None

    def answer(
        self, received: Tensor, verdict: Tensor, errors: list[BaseException]
    ) -> tuple[Tensor, BaseException | None]:
        """Takes in what has arrived and selects what goes to all.

        Args:
            received: the workers' payloads, uint8 [p, nbytes].
            verdict: of all of them.
            errors: gets what an action raised that was done all the same.

        Returns:
            d_j, and what has kept the step from being made, such as a damaged payload. The other
            workers wait, so there is always something to send: a payload that calls the step off,
            or lets all skip it.
        """
        part, plan = self.part, self._plan
        self._none_took_in = False
        stop = None if is_synchronous(verdict.device) else verdict & ~ops.NONFINITE
        try:
            merged = insist(
                lambda: ops.merge(received, part.numel, part.k, plan.wire_dtype, skip=stop), errors
            )
            if stop is not None:
                self.unusable = insist(lambda: _unusable(stop, merged), errors)
            self._add_momentum(errors)
            self._select(merged, verdict, errors)
            self._answer = self._selected[0]
            if self.unusable is not None:
                insist(partial(_call_off, self._answer, self.unusable), errors)
        except BaseException as error:
            if not self._selected:
                errors.clear()
                self._answer = self._nothing(ops.CALLED_OFF)
            else:
                self._answer = self._selected[0]
                self.take_back(None)
                self._answer = self._nothing(plan.tag, nonfinite=1)
            return self._answer, error
        return self._answer, None

    def refuse(self, verdict: int) -> Tensor:
        """Calls the step off.

        Args:
            verdict: of what all workers have sent; it may have kept the owners from taking that in.

        Returns:
            what to send.
        """
        self._none_took_in = bool(verdict & (ops.MISMATCH | ops.OFF))
        self._answer = self._nothing(ops.CALLED_OFF)
        return self._answer

    def _nothing(self, tag: int, nonfinite: int = 0) -> Tensor:
        part, device = self.part, self._owner.memory.device
        return steps.empty_payload(
            part.numel, part.k, self._plan.wire_dtype, tag, device, nonfinite
        )

    def _select(self, merged: Tensor, verdict: Tensor, errors: list[BaseException]) -> None:
        memory = self._owner.memory

        def compress() -> Tensor:
            return ops.compress_(
                memory,
                [None],
                self.part.k,
                params=[memory],  # for its size
                momentum=1.0,
                aggregate=merged,
                found_inf=verdict.float(),  # so that all skip the step
                wire_dtype=self._plan.wire_dtype,
                state=self._bucket.select_state(self.part.k, self.part.numel),
                tag=self._plan.tag,
            )

        insist_once(compress, errors, self._selected)

    def _add_momentum(self, errors: list[BaseException]) -> None:
        """r = memory_decay * r + beta * a_{t-1}, but for parameters without a gradient here."""
        if not self._has_decayed and self._plan.arguments["memory_decay"] != 1:
            for i, piece in self._pieces(self._owner.memory):
                if i not in self._absent:
                    piece.mul_(self._plan.arguments["memory_decay"])
        self._has_decayed = True
        aggregate = insist(self._previous, errors)
        if aggregate is not None and not self._has_momentum:
            # r - (-beta) a, each operation rounded to float32.
            beta = self._plan.arguments["momentum"]
            insist_once(lambda: ops.apply_([self._owner.memory], aggregate, -beta), errors)
        self._has_momentum = True

    def _previous(self) -> Tensor | None:
        """a_{t-1} within the range, where momentum is global."""
        bucket, owner = self._bucket, self._owner
        aggregate = None
        if bucket.momentum_buffer is None and len(self._absent) < len(bucket.params):
            aggregate = owner.aggregate_of(bucket.aggregate, bucket.numel)
        if aggregate is not None and self._absent:
            dense = ops.densify(aggregate, owner.range.numel)
            for i, piece in self._pieces(dense):
                if i in self._absent:
                    piece.zero_()
            aggregate = ops.sparsify(dense)
        return aggregate

    def _pieces(self, flat: Tensor) -> list[tuple[int, Tensor]]:
        """Each parameter's place in the bucket, with its piece of a tensor of the range."""
        found = within(self._bucket.sizes, self._owner.range)
        pieces = flat.split([last - first for _, first, last in found])
        return [(i, piece) for (i, _, _), piece in zip(found, pieces, strict=True)]

    def take_back(self, skip: Tensor | None) -> None:
        """What was sent to all returns to r where the step is skipped; None: it is."""
        if self._selected and self._answer is not None:
            part, memory = self.part, self._owner.memory
            ops.restore_(memory, self._answer, part.k, self._plan.wire_dtype, skip=skip)

    def give_back(self, payloads: Tensor, answers: Tensor) -> None:
        """What no owner has taken in returns to this worker's memory, without the host's help.

        Args:
            payloads: what this worker has sent to the owners.
            answers: what they have sent to all, uint8 [p, nbytes].
        """
        refused = steps.header_words(answers, steps.TAG) == ops.CALLED_OFF
        self._return(payloads, refused.int())

    def _return(self, payloads: Tensor, of: Tensor) -> None:
        """Returns to memory what was sent to the owners for whom `of`, int32 [p], is not zero."""
        plan, k = self._plan, self._plan.parts[0].k
        ops.restore_(self._bucket.memory, payloads, k, plan.wire_dtype, skip=of, **plan.ranges())

    def merge(self, skip: Tensor) -> Tensor | None:
        """a_t within this worker's range, where momentum is global."""
        if self._bucket.momentum_buffer is not None or self._answer is None:
            return None
        part, answer = self.part, self._answer.unsqueeze(0)
        return ops.merge(answer, part.numel, part.k, self._plan.wire_dtype, skip=skip)

    def keep(self, aggregate: Tensor, own: Tensor | None) -> None:
        """Makes these a_{t-1} of the next step, of the bucket and within the range."""
        if own is not None:
            self._bucket.keep_aggregate(aggregate)
            self._owner.keep(own, self._bucket.aggregate)

    def return_what_was_left(self, payloads: Tensor, answers: Tensor | None) -> None:
        """In a step that is not made: what owners have not taken in returns to memory.

        Args:
            payloads: what this worker has sent to the owners.
            answers: what they have sent to all, uint8 [p, nbytes]; None if it did not arrive.
        """
        self._add_momentum([])
        parts = self._plan.parts
        if self._none_took_in:
            taken = [False] * len(parts)
        elif answers is None:  # the group was lost; the other owners are taken to have been faster
            taken = [True] * len(parts)
            taken[self._owner.rank] = bool(self._selected)
        else:
            tags = steps.header_words(answers, steps.TAG).tolist()
            taken = [tag != ops.CALLED_OFF for tag in tags]
        left = [int(not was_taken) for was_taken in taken]
        self._return(payloads, torch.tensor(left, dtype=torch.int32, device=payloads.device))
