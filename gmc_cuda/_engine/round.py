"""One step of all buckets: send, receive, apply; and what state an error leaves.

A step is a transaction. Whatever can be refused is refused before a round is opened. While this
worker still has something to send, an error calls the step off on every worker: the others get
notices in the place of the payloads that they wait for. Once all is sent, the other workers may
apply the step, so this worker completes it too, and raises afterwards.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine import comparison, steps
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.device import is_synchronous
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.owner import owner_of
from gmc_cuda._engine.rules import Group, Plan, Rule, tag_of
from gmc_cuda._engine.watch import DamageWatch, DuplicateWatch, SkipWatch

numbers = itertools.count(1)  # numbers the optimizers and hooks of this process
_rounds: weakref.WeakSet[Round] = weakref.WeakSet()  # all rounds of this process


class Round:
    """The steps of one optimizer or hook, one after the other.

    Args:
        exchange: the workers.
        wire_dtype: dtype of the values sent.
        nonfinite: "skip" or "raise".
        number: this optimizer's number in the run, the same on all workers.
        facts: a method that returns the facts which must be equal on all workers, by the name under
            which errors report them. Its object is not kept alive.
        way: "all_gather" or "reduce_scatter".

    Attributes:
        steps: number of steps so far, skipped ones and those that were called off included.
        made: the same without those that were called off.
        called_off: those that this worker has called off, and the others know of.
        skipped: number of skipped steps, int64 [1] on the device; None before the first step.
        verdict: the last step's verdict, int32 [1], from ops.verdict; None if it failed before.
        device: where the parameters are.
    """

    def __init__(
        self,
        exchange: Exchange,
        wire_dtype: torch.dtype,
        nonfinite: str,
        number: int,
        facts: Callable[[], dict[str, Any]],
        way: str,
    ) -> None:
        self.exchange, self.wire_dtype, self.nonfinite = exchange, wire_dtype, nonfinite
        self.number, self._way = number, way
        self.steps = self.made = self.called_off = 0
        self.skipped: Tensor | None = None
        self.verdict: Tensor | None = None
        self.device = torch.device("cpu")
        self.damage, self.duplicates, self.skips = DamageWatch(), DuplicateWatch(), SkipWatch()
        self._facts = weakref.WeakMethod(facts)
        self._waiting: deque[tuple[Bucket, Plan]] = deque()
        self._sent: list[tuple[Bucket, steps.Step, steps.Sent]] = []
        self._last_plans: list[Plan] | None = None  # of the workers' last collectives
        self._tags: set[int] = set()  # the tags that were last sent
        _rounds.add(self)

    @property
    def two_sided(self) -> bool:
        """Whether a step sends twice: to the owners of ranges, and their answers."""
        return owner_of(self._way, self.exchange) is not None

    @property
    def is_open(self) -> bool:
        """Whether something was sent, and the step was not made yet."""
        return bool(self._sent)

    @property
    def waiting(self) -> list[Bucket]:
        """The buckets that are still to be sent, in order."""
        return [bucket for bucket, _ in self._waiting]

    def plan(
        self,
        rule: Rule,
        bucket: Bucket,
        index: int,
        group: Group,
        scaling: Mapping[str, Tensor | None],
        also: Sequence[int] = (),
    ) -> Plan:
        """The plan of a bucket's next step.

        Args:
            index: the bucket's place in the order of sending.
            group: the bucket's options.
            scaling: the arguments grad_scale and found_inf, from a GradScaler.
            also: further numbers that must be equal on all workers.
        """
        plan = rule.plan(group, bucket, self.wire_dtype, self.exchange)
        plan = plan._replace(arguments={**scaling, **plan.arguments})
        if self.exchange.size == 1:
            return plan
        options = [group[name] for name in rule.compared]
        tag = tag_of(self.number, self.steps, index, *plan.size(), self.wire_dtype, *options, *also)
        return plan._replace(tag=tag)

    # -------------------------------------------------------------------------------- sending

    def open(self, work: Sequence[tuple[Bucket, Plan]], known: bool = True) -> None:
        """Begins a step of these buckets.

        Args:
            known: False if more buckets will follow by :meth:`add`; then sizes are not compared.

        Raises:
            ValueError: on all workers, if their sizes differ; nothing of the step was sent.
        """
        before, plans = self._last_plans, [plan for _, plan in work]
        sizes = [plan.size() for plan in plans]
        if known and before and [plan.size() for plan in before] != sizes:
            self.compare(before, *sizes)
        self._last_plans = plans
        self._tags = {plan.tag for plan in plans}
        self.verdict = None
        self._waiting = deque(work)

    def compare(self, before: Sequence[Plan], *sizes: tuple[int, ...]) -> None:
        """Makes the workers compare the sizes of what they are about to send. Reads the device.

        Messages of different sizes must not meet: gloo ends the process, NCCL waits for ever. So a
        worker whose sizes change first sends a message of the old size, with a tag of the new ones.

        Args:
            before: the plans that workers without a change are about to follow.
            sizes: the sizes that this worker is about to send.

        Raises:
            ValueError: on all workers, if their sizes differ.
        """
        if self.exchange.size == 1:
            return
        tag = tag_of(self.number, self.steps, *chain.from_iterable(sizes))
        try:
            if self._verdict_of(self._notices(before[:1], tag)):
                self.called_off += 1
                self._verdict_of(self._notices(before[1:], ops.CALLED_OFF))
                self._raise_mismatch()
        except GroupLost as error:
            self._count_as_skipped()
            raise self.with_context(error, "nothing was applied") from error

    def forget_sizes(self) -> None:
        """Spares the next step the comparison of sizes, because the workers have just made it."""
        self._last_plans = None

    def add(self, bucket: Bucket, plan: Plan) -> None:
        """Adds a bucket that was not known when the step was opened."""
        self._tags.add(plan.tag)
        self._waiting.append((bucket, plan))

    def send(self, grads: list[Tensor | None]) -> Bucket:
        """Sends the next bucket. An error calls the step off.

        Args:
            grads: from ``bucket.flat_grads()``.
        """
        bucket, plan = self._waiting[0]
        try:
            self._sent.append((bucket, *steps.send(bucket, self.exchange, grads, plan)))
        except BaseException:
            if self._sent and self._sent[-1][0] is bucket:
                self._waiting.popleft()
            self.cancel()
            raise
        self._waiting.popleft()
        return bucket

    # ------------------------------------------------------------------ receiving and applying

    def finish(
        self, target_of: Callable[[Bucket], tuple[list[Tensor], float | Tensor]]
    ) -> list[BaseException]:
        """Waits for all payloads, and applies them unless the verdict is to skip.

        Args:
            target_of: returns a bucket's contiguous parameters and its lr.

        Returns:
            Errors that came when the step could no longer be called off. They are to be raised now
            that it is made, see steps.raise_first.

        Raises:
            FloatingPointError: on every worker, with nonfinite="raise", for a non-finite gradient.
            ValueError: on every worker, if what arrived does not belong together.
            RuntimeError: another worker has called the step off, a payload is damaged, or the
                group was lost. Nothing was applied, and what was sent is in memory.
        """
        late: list[BaseException] = []
        try:
            skip, aggregates = self._receive(late)
        except GroupLost as error:
            self._close()
            self._count_as_skipped()
            raise self.with_context(error, "nothing was applied") from error
        except BaseException:
            self._close()
            self._count_as_skipped(0 if self.verdict is None else int(self.verdict))
            raise
        self._look_for_duplicates(aggregates, late)
        self._apply(skip, target_of, late)
        return late

    def with_context(self, error: GroupLost, outcome: str) -> GroupLost:
        """The error for users; see GroupLost.with_context."""
        return error.with_context(f"step {self.steps}", self.exchange.rank, outcome)

    def _receive(self, late: list[BaseException]) -> tuple[Tensor, list[Tensor]]:
        sents = [sent for _, _, sent in self._sent]
        for sent in sents:
            steps.insist(sent.work.wait, late)
        verdict = self._judge(sents, late)
        if self.two_sided:
            # Only the owner that got a damaged payload sees the damage. The other workers learn of
            # it from the owner's answer.
            self._raise_on(verdict, unless=ops.DAMAGED)
            answers = [step.send(verdict) for _, step, sent in self._sent if sent.two_sided]
            for answer in answers:
                steps.insist(answer.work.wait, late)
            verdict = verdict | self._judge(answers, late)
            for answer in answers:
                if answer.unusable is not None:
                    verdict = verdict | answer.unusable
                if answer.error is not None:
                    self.verdict = verdict
                    raise answer.error
        self._raise_on(verdict)
        return verdict, [step.send(verdict) for _, step, _ in self._sent]

    def _judge(self, sents: Sequence[steps.Sent], late: list[BaseException]) -> Tensor:
        """The verdict on what has arrived, over all buckets and all shards.

        Every worker that holds a shard asks as often, also where it has sent nothing.
        """
        verdict = steps.insist(lambda: _verdict(sents, self.device), late)
        return self.exchange.strictest(verdict)

    def _apply(
        self,
        skip: Tensor,
        target_of: Callable[[Bucket], tuple[list[Tensor], float | Tensor]],
        late: list[BaseException],
    ) -> None:
        if self.skipped is None:
            self.skipped = torch.zeros(1, dtype=torch.int64, device=skip.device)
        flags = steps.insist(lambda: self.damage.flags(skip, self.exchange.size), late)
        count, first = self.skipped, True
        sent, self._sent = self._sent, []
        try:
            for bucket, step, _ in sent:
                try:
                    params, lr = steps.insist(partial(target_of, bucket), late)
                    # Only the first bucket counts the skipped step.
                    step.send(steps.Target(params, lr, count if first else None, flags))
                except StopIteration:
                    pass
                except BaseException as error:
                    step.close()
                    late.append(error)
                first = False
            if not sent:  # a worker whose shards are all empty
                count += skip != 0
        finally:  # also after an interrupt: the other workers have made it
            self.steps += 1
            self.made += 1
        steps.insist(self.damage.report, late)
        if self.nonfinite == "skip":
            sents = [sent for _, _, sent in sent]
            steps.attempt(partial(self.skips.look, count, partial(self._nonfinite, sents)), late)

    def _raise_on(self, skip: Tensor, unless: int = 0) -> None:
        """Raises for a verdict that ends the step here.

        Args:
            unless: bits to ignore for now.
        """
        self.verdict = skip
        if not self._reads_verdicts():
            return
        verdict, rank = int(skip) & ~unless, self.exchange.rank
        if verdict & ops.MISMATCH:
            self._raise_mismatch()
        if verdict & ops.OFF:
            why = "another worker left it by an exception before it had sent all of its part"
            if verdict & ops.DAMAGED:  # two-sided compression: this owner has called it off
                why = f"rank {rank} received a damaged payload"
            raise RuntimeError(
                f"step {self.steps + 1}: {why}. No worker has made the step, what was sent is back "
                "in memory, and the next step works"
            )
        if verdict & ops.DAMAGED:
            raise RuntimeError(
                f"rank {rank} received a damaged payload header; the step was not made here, and "
                "replicas may differ: restart from a checkpoint"
            )
        if verdict and self.nonfinite == "raise":
            met = self._nonfinite([sent for _, _, sent in self._sent])
            where = ", ".join(met) or "on workers of these nodes that hold other shards"
            raise FloatingPointError(
                f"non-finite gradient values: {where}; the step was not made, and the finite "
                "gradients stay in memory (nonfinite='skip' goes on without raising)"
            )

    def _nonfinite(self, sents: Sequence[steps.Sent]) -> list[str]:
        """How many non-finite values each rank that had any sent, over all buckets."""
        if not sents:
            return []
        counts = torch.stack([sent.nonfinite() for sent in sents]).sum(0).tolist()
        return [f"{n} on rank {self.exchange.name(r)}" for r, n in enumerate(counts) if n]

    def _reads_verdicts(self) -> bool:
        """Whether the host reads verdicts; to read a GPU's makes it wait for the device."""
        return is_synchronous(self.device) or self.nonfinite == "raise"

    def _stops(self, verdict: int) -> bool:
        """Whether this verdict, before the owners' answers, makes all workers leave the step."""
        bits = ops.MISMATCH | ops.OFF | (ops.NONFINITE if self.nonfinite == "raise" else 0)
        return self._reads_verdicts() and bool(verdict & bits)

    def _raise_mismatch(self) -> None:
        """Raises ValueError with the facts in which the workers differ.

        Collective where verdicts are read.
        """
        describe = self._facts()
        assert describe is not None
        own = {"step": self.steps + 1, **describe()}
        senders = {tag: round.number for round in _rounds for tag in round._tags}
        answers = [(own, senders)]
        # Where verdicts are not read, the others have gone on, and learn it one step later.
        if self._reads_verdicts():
            answers = self.exchange.gather_objects((own, senders), self.device)
        found = comparison.differences([facts for facts, _ in answers])
        advice = "All workers must change options and layers in the same step"
        crossed = self._crossed([senders for _, senders in answers])
        if crossed:
            found += f"\n  {crossed}"
            advice = (
                "The collectives of two optimizers crossed: give each a process_group of its own "
                "(torch.distributed.new_group()), or use overlap=False"
            )
        elif "bits of " in found:
            advice = (
                "Load weights before the optimizer is constructed, which gives all workers rank 0's"
            )
        elif not found:
            found = "\n  nothing that is named here: a tensor on a GPU, or what changed back since"
        raise ValueError(
            f"step {self.steps + 1}: what the workers sent does not belong together. They differ "
            f"in:{found}\nThe step was not made on any worker, and what was sent is back in "
            f"memory. {advice}"
        )

    def _crossed(self, senders: list[dict[int, int]]) -> str:
        """The numbers of the optimizers whose messages met; empty if it was one optimizer.

        Args:
            senders: for each rank, the optimizer's number by tag.
        """
        for _, _, sent in self._sent:
            numbers = [known.get(tag) for known, tag in zip(senders, sent.tags(), strict=True)]
            if None not in numbers and len(set(numbers)) > 1:
                return "optimizer (they are numbered as they were constructed): " + ", ".join(
                    f"{number} on rank {rank}" for rank, number in enumerate(numbers)
                )
        return ""

    def _look_for_duplicates(self, aggregates: list[Tensor], late: list[BaseException]) -> None:
        if self.exchange.size == 1 or self.duplicates.ended:
            return
        sparse = [
            (sent.payloads[0], aggregate, bucket)
            for (bucket, _, sent), aggregate in zip(self._sent, aggregates, strict=True)
            if sent.payloads
        ]
        look = partial(
            self.duplicates.look,
            [payloads for payloads, _, _ in sparse],
            [(aggregate, bucket) for _, aggregate, bucket in sparse],
            self.exchange.size,
        )
        steps.attempt(look, late)

    # --------------------------------------------------------------------------- calling off

    def cancel(self) -> None:
        """Gives a step up; what was sent of it returns to memory.

        Other workers get notices in the place of the payloads that they wait for. All workers may
        cancel a step at once, each at another point of it.
        """
        waiting, self._waiting = self._waiting, deque()
        if not self._sent:
            return
        self.called_off += 1
        verdict = 0
        try:
            plans = [plan for _, plan in waiting]
            sents = [sent for _, _, sent in self._sent]
            if not self.exchange.alone:
                verdict = self._verdict_of(sents + self._notices(plans, ops.CALLED_OFF))
                verdict |= self._call_off_answers(plans, verdict)
        except GroupLost:
            verdict = ops.OFF
        finally:
            self._close()
        self._count_as_skipped(verdict)

    def _call_off_answers(self, waiting: Sequence[Plan], verdict: int) -> int:
        """Sends notices in the place of this owner's answers, if the other workers wait for them.

        Args:
            waiting: plans of the buckets of which nothing was sent.
            verdict: the verdict on what all workers have sent to the owners.

        Returns:
            The verdict on the answers.
        """
        if not self.two_sided or self._stops(verdict):
            return 0
        called_off = steps.CalledOff(verdict)
        answers = [step.throw(called_off) for _, step, sent in self._sent if sent.two_sided]
        answers += [
            steps.answer_notice(self.exchange, plan, self.device) for plan in waiting if plan.parts
        ]
        return self._verdict_of(answers)

    def _close(self) -> None:
        sent, self._sent = self._sent, []
        for _, step, _ in sent:
            step.close()

    def _count_as_skipped(self, verdict: int = ops.OFF) -> None:
        """Counts a step that no worker has made as skipped.

        If the others have made it, it is not counted: they are one step ahead, and the next step
        raises for that. Steps that did not belong together are not counted either, so that workers
        which were one step apart can meet again.
        """
        if not self.exchange.alone and (verdict == 0 or verdict & ops.MISMATCH):
            return
        self.steps += 1
        if self.skipped is None:
            self.skipped = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.skipped += 1

    def _notices(self, plans: Sequence[Plan], tag: int) -> list[steps.Sent]:
        return [steps.notice(self.exchange, plan, tag, self.device) for plan in plans]

    def _verdict_of(self, sents: list[steps.Sent]) -> int:
        """Waits for these, and returns the verdict on them. Reads the device."""
        for sent in sents:
            sent.work.wait()
        return int(self.exchange.strictest(_verdict(sents, self.device)))


def _verdict(sents: Sequence[steps.Sent], device: torch.device) -> Tensor:
    """The verdict over all buckets, int32 [1], from ops.verdict; zero if nothing was sent."""
    if not sents:
        return torch.zeros(1, dtype=torch.int32, device=device)
    return ops.verdict(
        [payloads for sent in sents for payloads in sent.payloads],
        [sent.counts for sent in sents if sent.counts is not None],
    )
