"""One step of one bucket as a generator, which yields at each collective.

A step goes in three stages (with two-sided compression in four, because that sends twice):

    sent = next(step)             makes v, and sends
    aggregate = step.send(skip)   merges the payloads, which have arrived, by the workers' verdict
    step.send(target)             moves the parameters, or returns a skipped step's payload to
                                  memory, and ends

If it is closed earlier, what was taken out of memory returns there, and a_t is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gmc_cuda import ops, reference
from gmc_cuda._engine import budget, missing
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.exchange import Exchange, GroupLost, Work
from gmc_cuda._engine.rules import Plan

T = TypeVar("T")


COUNT, TAG = 1, 5  # words of a payload's header: the count of non-finite values, and the tag
FLAGS = 1  # of an aggregate's header: the bits of a verdict that merging has found


def header_words(payloads: Tensor, i: int) -> Tensor:
    """The i-th 32-bit word of the header of each payload, int32 [p]; payloads: uint8 [p, n]."""
    return payloads[:, 4 * i : 4 * i + 4].contiguous().view(torch.int32).flatten()


def header_word(made: Tensor, i: int) -> Tensor:
    """The i-th 32-bit word of a payload or an aggregate that was made here: a view, int32 [1]."""
    return made[4 * i : 4 * i + 4].view(torch.int32)


class Sent(NamedTuple):
    """What a step has sent.

    Attributes:
        work: the collective.
        payloads: every rank's payload, uint8 [p, n], one tensor for each size; empty if v itself is
            summed.
        counts: every rank's count of non-finite values, then every rank's tag, float32 [2p]; None
            if payloads are sent.
        two_sided: whether the next yield of the step sends again.
        error: why this worker has sent a notice only; to be raised once the others have it.
        unusable: of an owner's answer, where the host reads no errors: the bits of a verdict for
            which it has called the step off, int32 [1].
    """

    work: Work
    payloads: tuple[Tensor, ...]
    counts: Tensor | None
    two_sided: bool = False
    error: BaseException | None = None
    unusable: Tensor | None = None

    def nonfinite(self) -> Tensor:
        """Every rank's count of non-finite values, int64 [p]."""
        if self.counts is None:
            return self._header_words(COUNT).to(torch.int64) & 0xFFFFFFFF  # it is unsigned
        return self.counts.chunk(2)[0].to(torch.int64)

    def tags(self) -> list[int]:
        """Every rank's tag; reads the device."""
        if self.counts is None:
            return self._header_words(TAG).tolist()
        return [int(tag) for tag in self.counts.chunk(2)[1].tolist()]

    def _header_words(self, i: int) -> Tensor:
        return torch.cat([header_words(payloads, i) for payloads in self.payloads])


class Target(NamedTuple):
    """What a step moves by a_t.

    Attributes:
        params: contiguous tensors in the bucket's order, from which lr * a_t is subtracted.
        lr: a number, or a tensor that holds one.
        skipped_steps: int64 [1], to which a skipped step adds 1; None: it does not.
        flags: int32 [1], in which a GPU sets bits for damaged payloads; None: it does not.
    """

    params: Sequence[Tensor]
    lr: float | Tensor
    skipped_steps: Tensor | None
    flags: Tensor | None


Step = Generator[Any, Any, None]


class CalledOff(Exception):
    """Thrown into a two-sided step that this worker gives up after its first half.

    Attributes:
        verdict: the verdict on what all workers have sent to the owners.
    """

    def __init__(self, verdict: int) -> None:
        super().__init__("the step was called off")
        self.verdict = verdict


def send(
    bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan
) -> tuple[Step, Sent]:
    """Begins a bucket's step. If this raises, nothing was sent, and memory has all of v."""
    step = _kind_of(plan)(bucket, exchange, grads, plan)
    try:
        sent: Sent = next(step)
    except BaseException:
        step.close()  # an interrupt may have come when it had sent, and what it took must return
        raise
    bucket.sent_nbytes, bucket.sent_entries = plan.nbytes, plan.k
    bucket.link_nbytes = plan.link_nbytes
    return step, sent


def _kind_of(plan: Plan) -> Callable[..., Step]:
    if plan.dense:
        return dense_step
    if not plan.parts:
        return sparse_step
    from gmc_cuda._engine.two_sided import two_sided_step  # which imports this module

    return two_sided_step


def sparse_step(bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan) -> Step:
    """Compresses a bucket and gathers the payloads of all ranks.

    A parameter without a gradient on this worker is left alone here: nothing is added to its
    memory, neither momentum nor weight decay. What is in its memory can still be sent.

    Args:
        grads: from ``bucket.flat_grads()``.
    """
    k, wire_dtype = plan.k, plan.wire_dtype
    taken: list[Tensor] = []  # the payload, once it is no longer in memory
    moved: list[None] = []
    try:
        with (
            missing.left_alone(bucket, grads, plan.arguments) as (arguments, params, aggregate),
            ops.noted(taken),
        ):
            payload = ops.compress_(
                bucket.memory,
                grads,
                k,
                params=params,
                aggregate=aggregate,
                momentum_buffer=bucket.momentum_buffer,
                wire_dtype=wire_dtype,
                state=bucket.select_state(k),
                tag=plan.tag,
                **arguments,
            )
        payloads, work = exchange.all_gather(payload)
        skip = yield Sent(work, (payloads,), None)
        use_on_this_stream(payload, payloads)
        errors: list[BaseException] = []

        def merge() -> Tensor:
            nbytes = budget.aggregate_nbytes(bucket.numel, k, payloads.size(0))
            spare = bucket.spare_aggregate(nbytes)
            return ops.merge(payloads, bucket.numel, k, wire_dtype, skip=skip, out=spare)

        aggregate = insist(merge, errors)
        target: Target = yield aggregate

        def move() -> None:
            ops.apply_(
                target.params,
                aggregate,
                moved_lr(plan, target.lr),
                skip=skip,
                skipped_steps=target.skipped_steps,
                flags=target.flags,
                memory=bucket.memory,
                payload=payload,
                k=k,
                wire_dtype=wire_dtype,
            )

        def mask() -> None:
            if bucket.momentum_buffer is not None and plan.masking:
                ops.mask_(bucket.momentum_buffer, payload, k, wire_dtype, skip=skip)

        insist_once(lambda: look_back(target, bucket.sparse_aggregate, plan, skip), errors)
        insist_once(move, errors, moved)
        insist_once(mask, errors)
        insist_once(lambda: _keep(bucket, aggregate), errors)
    finally:
        if taken and not moved:
            insist(lambda: use_on_this_stream(*taken), [])
            insist_once(lambda: ops.restore_(bucket.memory, taken[0], k, wire_dtype), [])
            taken_back(bucket)
    raise_first(errors)


def dense_step(bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan) -> Step:
    """Sums v itself over all ranks.

    The message also holds each rank's count of non-finite values, each rank's tag, and for each
    parameter how many ranks have a gradient. A parameter for which none has one is left alone with
    its momentum, as by torch.optim.SGD; if some have one, a missing gradient counts as zero.
    """
    ranks, rank = exchange.size, exchange.rank
    bucket.fold_owner()
    alone = missing.LeftAloneByAll(bucket, grads)
    previous = bucket.dense_aggregate() if bucket.momentum_buffer is None else None
    summed: list[Tensor] = []  # what is to be summed, once the gradients are in memory
    moved: list[None] = []
    try:
        with ops.noted(summed):
            total = ops.accumulate_(
                bucket.memory,
                grads,
                params=missing.needed_params(bucket, alone.absent, plan.arguments),
                aggregate=previous,
                momentum_buffer=bucket.momentum_buffer,
                rank=rank,
                ranks=2 * ranks + len(bucket.params),
                **plan.arguments,
            )
        v, counts, present = total.split([bucket.numel, 2 * ranks, len(bucket.params)])
        counts[ranks + rank] = float(plan.tag)
        alone.announce(present)
        work = exchange.all_reduce(total)
        skip = yield Sent(work, (), counts)
        use_on_this_stream(total)
        target: Target = yield v
        errors: list[BaseException] = []

        def before() -> None:
            alone.leave(v)
            look_back(target, lambda: alone.without(previous), plan, skip)

        def move() -> None:
            ops.apply_dense_(
                target.params,
                bucket.memory,
                total[: bucket.numel + ranks],
                moved_lr(plan, target.lr),
                skip=skip,
                skipped_steps=target.skipped_steps,
                flags=target.flags,
            )

        insist_once(before, errors)
        insist_once(move, errors, moved)
        insist_once(lambda: alone.put_back(v, previous), errors)
        insist_once(lambda: _keep(bucket, v), errors)
    finally:
        if summed and not moved:  # until then memory holds all of v
            taken_back(bucket)
    raise_first(errors)


def notice(exchange: Exchange, plan: Plan, tag: int, device: torch.device) -> Sent:
    """Sends a tag in the place of a bucket's step, in a message of the same size.

    The tag tells the other workers that this one does not make their step. They ignore the rest of
    the message.
    """
    if plan.dense:
        total = torch.zeros(plan.nbytes // 4, dtype=torch.float32, device=device)
        counts = total[plan.numel : plan.numel + 2 * exchange.size]
        counts[exchange.size + exchange.rank] = float(tag)
        return Sent(exchange.all_reduce(total), (), counts)
    if plan.parts:
        nothing = [empty_payload(p.numel, p.k, plan.wire_dtype, tag, device) for p in plan.parts]
        received, work = exchange.all_to_all(torch.cat(nothing), *plan.split(exchange.rank))
        return Sent(work, (received,), None)
    payload = empty_payload(plan.numel, plan.k, plan.wire_dtype, tag, device)
    payloads, work = exchange.all_gather(payload)
    return Sent(work, (payloads,), None)


def answer_notice(exchange: Exchange, plan: Plan, device: torch.device) -> Sent:
    """Sends a notice in the place of an owner's answer, see :func:`notice`."""
    part = plan.parts[exchange.rank]
    nothing = empty_payload(part.numel, part.k, plan.wire_dtype, ops.CALLED_OFF, device)
    return send_answer(exchange, plan, nothing)[1]


def send_answer(
    exchange: Exchange, plan: Plan, payload: Tensor, error: BaseException | None = None
) -> tuple[Tensor, Sent]:
    """Sends an owner's payload to all.

    Returns:
        all owners' payloads, uint8 [p, n], those of shorter ranges padded; and what is on its way.
    """
    padding = plan.parts[0].nbytes - payload.numel()
    gathered, work = exchange.all_gather(torch.nn.functional.pad(payload, (0, padding)))
    last = plan.parts[-1].nbytes  # only the last range may be shorter
    if last == gathered.size(1):
        return gathered, Sent(work, (gathered,), None, error=error)
    return gathered, Sent(work, (gathered[:-1], gathered[-1:, :last]), None, error=error)


def empty_payload(
    numel: int,
    k: int,
    wire_dtype: torch.dtype,
    tag: int,
    device: torch.device,
    nonfinite: int = 0,
) -> Tensor:
    """A payload of zeros, with this tag and count of non-finite values."""
    nothing = reference.encode(torch.zeros(k, dtype=torch.float32, device=device), wire_dtype)
    return reference.pack(
        torch.arange(k, dtype=torch.int64, device=device), nothing, numel, wire_dtype,
        scale=0, tag=tag, nonfinite=torch.tensor(nonfinite, dtype=torch.int64, device=device),
    )  # fmt: skip


# ---------------------------------------------------------------- what can no longer be called off


def insist(action: Callable[[], T], errors: list[BaseException]) -> T:
    """Repeats an action once if it raises, because the other workers complete the step by now.

    Args:
        action: may be repeated: if it raises it has changed nothing, or what a repeat will set.
        errors: gets the first error, to be raised when the step is complete.

    Returns:
        What the action returned. The second error, if there is one, is raised.
    """
    try:
        return action()
    except GroupLost:
        raise
    except BaseException as error:
        errors.append(error)
        return action()


def insist_once(
    action: Callable[[], Any], errors: list[BaseException], done: list[Any] | None = None
) -> None:
    """Repeats an action that must not be done twice, only if it has changed nothing.

    An operator that raises an error has changed nothing. One that an interrupt came in has done its
    work.

    Args:
        action: may be repeated until it has called an operator of :class:`ops.noted`, and calls one
            of them at most.
        errors: as for :func:`insist`.
        done: an empty list, which gets what that operator returned.
    """
    done = [] if done is None else done
    try:
        with ops.noted(done):
            action()
    except BaseException as error:
        errors.append(error)
        if not done:
            with ops.noted(done):
                action()


def attempt(action: Callable[[], None], errors: list[BaseException]) -> None:
    """Does something optional, such as a warning, which a filter may turn into an error."""
    try:
        action()
    except BaseException as error:
        errors.append(error)


def raise_first(errors: list[BaseException]) -> None:
    if errors:
        raise errors[0]


# Nesterov: w -= lr * ((1 + beta) a_t - beta' a_{t-1}), where beta' is the factor of a_{t-1} in v.
# The second term undoes the last step's look-ahead, and each term is applied by itself.


def moved_lr(plan: Plan, lr: float | Tensor) -> float | Tensor:
    return lr if plan.look_ahead is None else lr * (1 + plan.look_ahead)


def look_back(
    target: Target, previous: Callable[[], Tensor | None], plan: Plan, skip: Tensor
) -> None:
    """Undoes the look-ahead of the step before."""
    aggregate = None if plan.look_ahead is None else previous()
    if aggregate is not None:
        ops.apply_(target.params, aggregate, -target.lr * plan.arguments["momentum"], skip=skip)


def _keep(bucket: Bucket, aggregate: Tensor) -> None:
    if bucket.momentum_buffer is None:
        bucket.keep_aggregate(aggregate)


def taken_back(bucket: Bucket) -> None:
    """Drops a_{t-1} and the gradients, which are in memory again as parts of v."""
    bucket.aggregate = None
    bucket.forget_grads()


def use_on_this_stream(*tensors: Tensor) -> None:
    """Keeps the allocator from reusing tensors of another stream, as overlap has, too early."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
