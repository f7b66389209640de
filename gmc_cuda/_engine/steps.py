"""One step of one bucket as a generator: what is done before the collective, between, and after.

Every step yields three times (with two-sided compression four, as that sends twice):

    sent = next(step)             v is made and on its way
    aggregate = step.send(skip)   all payloads are here and the workers agree whether to skip
    step.send(target)             moves the parameters, or in a skipped step gives back, and ends

Closing it earlier gives back: what was taken out of memory returns there, and a_t is zero.
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


class Sent(NamedTuple):
    """What a step has on its way.

    Attributes:
        work: the collective.
        payloads: every rank's payload, uint8 [p, n], those of one size each; empty where v itself
            is summed.
        counts: every rank's count of non-finite values, then every rank's tag, float32 [2p]; None
            where payloads are sent.
        two_sided: whether the step has another half, which its next yield sends.
        error: what keeps this worker from sending more than a notice; to be raised once the others
            have it.
    """

    work: Work
    payloads: tuple[Tensor, ...]
    counts: Tensor | None
    two_sided: bool = False
    error: BaseException | None = None

    def nonfinite(self) -> Tensor:
        """Every rank's count of non-finite values, int64 [p]."""
        if self.counts is None:
            return torch.cat([ops.payload_nonfinite(payloads) for payloads in self.payloads])
        return self.counts.chunk(2)[0].to(torch.int64)

    def tags(self) -> list[int]:
        """Every rank's tag; reads the device."""
        if self.counts is None:  # the last word of each header
            words = [payloads[:, 20:24].contiguous() for payloads in self.payloads]
            return torch.cat(words).view(torch.int32).flatten().tolist()
        return [int(tag) for tag in self.counts.chunk(2)[1].tolist()]


class Target(NamedTuple):
    """Where a_t goes.

    Attributes:
        params: contiguous tensors in the bucket's order, from which lr * a_t is taken.
        lr: a number or a tensor holding one.
        skipped_steps: int64 [1], counted up in a skipped step; None: it is not.
        flags: int32 [1], where a GPU reports damage; None: it does not.
    """

    params: Sequence[Tensor]
    lr: float | Tensor
    skipped_steps: Tensor | None
    flags: Tensor | None


Step = Generator[Any, Any, None]


class CalledOff(Exception):
    """Thrown into a two-sided step that this worker gives up after its first half.

    Attributes:
        verdict: of what all workers have sent to the owners.
    """

    def __init__(self, verdict: int) -> None:
        super().__init__("the step was called off")
        self.verdict = verdict


def send(
    bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan
) -> tuple[Step, Sent]:
    """Starts a bucket's step. If this raises, nothing was sent, and memory has all of v."""
    step = _kind_of(plan)(bucket, exchange, grads, plan)
    sent: Sent = next(step)
    bucket.sent_nbytes, bucket.sent_entries = plan.nbytes, plan.k
    bucket.link_nbytes = plan.link_nbytes
    return step, sent


def _kind_of(plan: Plan) -> Callable[..., Step]:
    if plan.dense:
        return dense_step
    if not plan.parts:
        return sparse_step
    from gmc_cuda._engine.two_sided import two_sided_step  # which is made of what stands below

    return two_sided_step


def sparse_step(bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan) -> Step:
    """Compresses a bucket and gathers the payloads of all ranks.

    A parameter without a gradient on this worker is left alone by it: nothing is added to its
    memory, neither momentum nor weight decay. What is in its memory can still be sent.

    Args:
        grads: from ``bucket.flat_grads()``.
    """
    k, wire_dtype = plan.k, plan.wire_dtype
    with missing.left_alone(bucket, grads, plan.arguments) as (arguments, params, aggregate):
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
    applied = False
    try:
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
        insist_once(move, errors)
        applied = True
        insist_once(mask, errors)
        insist_once(lambda: _keep(bucket, aggregate), errors)
    finally:
        if not applied:
            insist(lambda: ops.restore_(bucket.memory, payload, k, wire_dtype), [])
            taken_back(bucket)
    raise_first(errors)


def dense_step(bucket: Bucket, exchange: Exchange, grads: list[Tensor | None], plan: Plan) -> Step:
    """Sums v itself over all ranks.

    After v travel each rank's count of non-finite values, its tag, and for each parameter how many
    ranks have a gradient. A parameter that none has a gradient for is left alone, momentum and all,
    as by torch.optim.SGD; if some have one, the others count as zero.
    """
    ranks, rank = exchange.size, exchange.rank
    bucket.fold_owner()
    alone = missing.LeftAloneByAll(bucket, grads)
    previous = bucket.dense_aggregate() if bucket.momentum_buffer is None else None
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
    applied = False
    try:
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
        insist_once(move, errors)
        applied = True
        insist_once(lambda: alone.put_back(v, previous), errors)
        insist_once(lambda: _keep(bucket, v), errors)
    finally:
        if not applied:  # memory holds all of v until then
            taken_back(bucket)
    raise_first(errors)


def notice(exchange: Exchange, plan: Plan, tag: int, device: torch.device) -> Sent:
    """Sends a tag in the place of a bucket's step, in a message of the same size.

    The workers find out from it that this one does not go on as they do. What else is in it is
    never looked at.
    """
    if plan.dense:
        total = torch.zeros(plan.nbytes // 4, dtype=torch.float32, device=device)
        counts = total[plan.numel : plan.numel + 2 * exchange.size]
        counts[exchange.size + exchange.rank] = float(tag)
        return Sent(exchange.all_reduce(total), (), counts)
    if plan.parts:
        nothing = [empty_payload(p.numel, p.k, plan.wire_dtype, tag, device) for p in plan.parts]
        received, work = exchange.all_to_all(nothing, plan.parts[exchange.rank].nbytes)
        return Sent(work, (received,), None)
    payload = empty_payload(plan.numel, plan.k, plan.wire_dtype, tag, device)
    payloads, work = exchange.all_gather(payload)
    return Sent(work, (payloads,), None)


def answer_notice(exchange: Exchange, plan: Plan, device: torch.device) -> Sent:
    """Sends a notice in the place of an owner's answer, see :func:`notice`."""
    part = plan.parts[exchange.rank]
    return send_answer(
        exchange, plan, empty_payload(part.numel, part.k, plan.wire_dtype, ops.CALLED_OFF, device)
    )


def send_answer(
    exchange: Exchange, plan: Plan, payload: Tensor, error: BaseException | None = None
) -> Sent:
    """Sends an owner's payload to all; those of shorter ranges are padded."""
    padding = plan.parts[0].nbytes - payload.numel()
    gathered, work = exchange.all_gather(torch.nn.functional.pad(payload, (0, padding)))
    last = plan.parts[-1].nbytes  # of the only range that may be shorter
    if last == gathered.size(1):
        return Sent(work, (gathered,), None, error=error)
    return Sent(work, (gathered[:-1], gathered[-1:, :last]), None, error=error)


def empty_payload(
    numel: int,
    k: int,
    wire_dtype: torch.dtype,
    tag: int,
    device: torch.device,
    nonfinite: int = 0,
) -> Tensor:
    """A payload with that tag and count whose values are all zero."""
    nothing = reference.encode(torch.zeros(k, dtype=torch.float32, device=device), wire_dtype)
    return reference.pack(
        torch.arange(k, dtype=torch.int64, device=device), nothing, numel, wire_dtype,
        scale=0, tag=tag, nonfinite=torch.tensor(nonfinite, dtype=torch.int64, device=device),
    )  # fmt: skip


# ---------------------------------------------------------------- what can no longer be called off


def insist(action: Callable[[], T], errors: list[BaseException]) -> T:
    """Does it again if it raised, since the other workers go on by now; may raise then.

    Args:
        action: changes nothing if it raises, or the same when it is done again.
        errors: gets what it raised the first time, for when the step is complete.
    """
    try:
        return action()
    except GroupLost:
        raise
    except BaseException as error:
        errors.append(error)
        return action()


def insist_once(action: Callable[[], None], errors: list[BaseException]) -> None:
    """The same for what must not be done twice.

    An operator that raises has changed nothing; but an interrupt of the user's, which the
    interpreter raises after an operator has returned, has let it do its work.
    """
    try:
        action()
    except Exception as error:
        errors.append(error)
        action()
    except BaseException as error:
        errors.append(error)


def attempt(action: Callable[[], None], errors: list[BaseException]) -> None:
    """Does what a step can do without, such as a warning, which may have been made an error."""
    try:
        action()
    except BaseException as error:
        errors.append(error)


def raise_first(errors: list[BaseException]) -> None:
    if errors:
        raise errors[0]


# Nesterov: w -= lr * ((1 + beta) a_t - beta' a_{t-1}), where beta' is the factor of a_{t-1} in v,
# so that exactly what was looked ahead is taken back. Each term is applied by itself.


def moved_lr(plan: Plan, lr: float | Tensor) -> float | Tensor:
    return lr if plan.look_ahead is None else lr * (1 + plan.look_ahead)


def look_back(
    target: Target, previous: Callable[[], Tensor | None], plan: Plan, skip: Tensor
) -> None:
    """Takes back what the step before looked ahead."""
    aggregate = None if plan.look_ahead is None else previous()
    if aggregate is not None:
        ops.apply_(target.params, aggregate, -target.lr * plan.arguments["momentum"], skip=skip)


def _keep(bucket: Bucket, aggregate: Tensor) -> None:
    if bucket.momentum_buffer is None:
        bucket.keep_aggregate(aggregate)


def taken_back(bucket: Bucket) -> None:
    """Memory has v again, and with it the momentum and the gradients, which must not come twice."""
    bucket.aggregate = None
    bucket.forget_grads()


def use_on_this_stream(*tensors: Tensor) -> None:
    """With overlap they were made on the backward pass's stream, and are used and freed on this."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
