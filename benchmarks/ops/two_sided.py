"""A case with two-sided compression, as stages of a round: compress, own, merge, apply.

This process is rank 0 and owns the first range. What the other ranks send to it, and what the other
owners send to all, is made beforehand, in several sets with independent supports.
"""

from typing import Any

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.problem import LR, MOMENTUM, Problem
from benchmarks.ops.timing import Stage
from gmc_cuda import ops
from gmc_cuda._engine import budget
from gmc_cuda._engine.ranges import cut


class TwoSided(Problem):
    """Attributes beside Problem's:

    width, k: elements of a range, and the entries that are sent of it, in each direction.
    ks: the entries of each range, of which the last one may be shorter.
    owned: owner memory of this rank's range.
    received: what the ranks have sent to this owner, uint8 [p, nbytes].
    merged: what the owners have sent to all, uint8 [p, nbytes].
    """

    def begin(self) -> None:
        case, device = self.case, self.device
        self.ranges = cut(case.numel, case.ranks)
        if not self.ranges[-1].numel:
            raise ValueError(f"numel: got {case.numel} for {case.ranks} ranges, must fill all")
        self.width = self.ranges[0].numel
        self.ks = [budget.entries_at(case.density, of.numel) for of in self.ranges]
        self.k = self.ks[0]
        self.cut: dict[str, Any] = {
            "width": self.width,
            "last_k": self.ks[-1],
            "wire_dtype": case.wire_dtype,
        }
        self.sizes = [
            ops.payload_nbytes(of.numel, k, case.wire_dtype)
            for of, k in zip(self.ranges, self.ks, strict=True)
        ]
        self.state = ops.select_state(self.width, self.k, device, ranges=case.ranks)
        self.arriving, self.answers = self._sets()
        self.received, self.merged = self.arriving[0], self.answers[0]
        self.owned = torch.zeros(self.width, device=device)
        self.own_state = ops.select_state(self.width, self.k, device)
        self.answer = self.merged[0].clone()
        self._merge()

    def _sets(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What arrives at this owner, and what all owners answer, in each of several rounds."""
        case = self.case
        count = max(2, 32 // case.ranks)
        shape = (count, case.ranks, self.sizes[0])
        arriving, answers = (
            torch.zeros(shape, dtype=torch.uint8, device=self.device) for _ in range(2)
        )
        zeros = torch.zeros(case.numel, device=self.device)
        for turn in range(count):
            for rank in range(case.ranks):
                memory = self.gradients.fresh().to(torch.float32, copy=True)
                made = ops.compress_(memory, [zeros], self.k, state=self.state, **self.cut)
                payloads = made.split(self.sizes)
                arriving[turn, rank] = payloads[0]
                answers[turn, rank, : self.sizes[rank]] = payloads[rank]
        return list(arriving), list(answers)

    # ------------------------------------------------------------------------------ the stages

    def compress(self, turn: int) -> None:
        self.gradient = self.gradients.fresh()
        self.payload = ops.compress_(
            self.memory,
            self.split(self.gradient),
            self.k,
            momentum=MOMENTUM if self.local is not None else 0.0,
            momentum_buffer=self.local,
            state=self.state,
            **self.cut,
        )

    def exchange(self, turn: int) -> None:
        """Stands for the all-to-all; not timed."""
        self.received = self.arriving[turn % len(self.arriving)]
        self.received[0].copy_(self.payload[: self.sizes[0]])

    def own(self, turn: int) -> None:
        wire = self.case.wire_dtype
        merged = ops.merge(self.received, self.width, self.k, wire)
        if self.local is None:
            ops.apply_([self.owned], self.own_aggregate, -MOMENTUM)
        self.answer = ops.compress_(
            self.owned,
            [None],
            self.k,
            params=[self.owned],
            momentum=1.0,
            aggregate=merged,
            wire_dtype=wire,
            state=self.own_state,
        )

    def answer_all(self, turn: int) -> None:
        """Stands for the all-gather; not timed."""
        self.merged = self.answers[turn % len(self.answers)]
        self.merged[0].copy_(self.answer)

    def merge(self, turn: int) -> None:
        self._merge()

    def _merge(self) -> None:
        case = self.case
        self.aggregate = ops.merge_ranges(
            self.merged, case.numel, self.width, self.k, self.ks[-1], case.wire_dtype
        )
        if case.method == "gmc":
            self.own_aggregate = ops.merge(
                self.answer.unsqueeze(0), self.width, self.k, case.wire_dtype
            )

    def apply(self, turn: int) -> None:
        ops.apply_(self.split(self.params), self.aggregate, LR)

    def mask(self, turn: int) -> None:
        assert self.local is not None  # of DGC
        ops.mask_(self.local, self.payload, self.k, **self.cut)

    def stages(self) -> list[Stage]:
        compress, exchange, *others = super().stages()
        own = [Stage("own", self.own), Stage("answer", self.answer_all, timed=False)]
        return [compress, exchange, *own, *others]

    # -------------------------------------------------------------------------------- figures

    def repairs(self) -> int:
        return ops.repairs(self.state) + ops.repairs(self.own_state)

    def touched(self) -> torch.Tensor:
        case = self.case
        touched = torch.zeros(case.numel, dtype=torch.bool, device=self.device)
        rows = zip(self.merged, self.ranges, self.ks, self.sizes, strict=True)
        for row, of, k, nbytes in rows:
            indices = ops.unpack(row[:nbytes], of.numel, k, case.wire_dtype)[0]
            touched[of.begin + indices] = True
        return touched


def make_problem(case: Case, device: torch.device) -> Problem:
    two_sided = case.exchange == "reduce_scatter" and case.ranks > 1
    return (TwoSided if two_sided else Problem)(case, device)
