"""One case's tensors, and the three ops as stages of a round: compress, merge, apply.

This process is rank 0. The payloads of the other ranks are made beforehand, in several sets with
independent supports; each round takes the next set, puts its own payload in, merges, applies, and
hands the aggregate to the next round's compress.
"""

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.data import Gradients
from benchmarks.ops.timing import Stage
from gmc_cuda import ops

LR, MOMENTUM = 0.1, 0.9


class Problem:
    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.gradients = Gradients(case.numel, case.dtype, case.data, device, self.generator)
        self.size = -(-case.numel // case.tensors)
        self.begin()
        self.params = torch.zeros(case.numel, dtype=case.dtype, device=device)
        self.memory = torch.zeros(case.numel, device=device)
        self.local = torch.zeros_like(self.memory) if case.method == "dgc" else None
        self.spare: torch.Tensor | None = None
        self.repairs_before = 0  # made before the timed rounds

    def begin(self) -> None:
        """Makes what depends on the exchange."""
        case, device = self.case, self.device
        self.payloads = self._payload_sets()
        self.state = ops.select_state(case.numel, case.k, device)
        self.payload = self.payloads[0][0].clone()
        self.merged = self.payloads[0]
        self.aggregate = ops.merge(self.merged, case.numel, case.k, case.wire_dtype)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The bucket's tensors, as views of one buffer."""
        return list(flat.split(self.size))

    def _payload_sets(self) -> list[torch.Tensor]:
        case = self.case
        nbytes = case.payload_nbytes
        count = max(2, 32 // case.ranks)
        sets = torch.empty(count, case.ranks, nbytes, dtype=torch.uint8, device=self.device)
        state = ops.select_state(case.numel, case.k, self.device)
        zeros = torch.zeros(case.numel, device=self.device)
        for payload in sets.view(-1, nbytes):
            memory = self.gradients.fresh().to(torch.float32, copy=True)
            made = ops.compress_(memory, [zeros], case.k, wire_dtype=case.wire_dtype, state=state)
            payload.copy_(made)
        return list(sets)

    # ------------------------------------------------------------------------------ the stages

    def compress(self, turn: int) -> None:
        case = self.case
        self.gradient = self.gradients.fresh()
        self.payload = ops.compress_(
            self.memory,
            self.split(self.gradient),
            case.k,
            momentum=MOMENTUM,
            aggregate=self.aggregate if self.local is None else None,
            momentum_buffer=self.local,
            wire_dtype=case.wire_dtype,
            state=self.state,
        )

    def exchange(self, turn: int) -> None:
        """Stands for the all-gather; not timed. With DGC's momentum factor masking."""
        self.payloads[turn % len(self.payloads)][0].copy_(self.payload)

    def mask(self, turn: int) -> None:
        assert self.local is not None  # of DGC
        ops.mask_(self.local, self.payload, self.case.k, self.case.wire_dtype)

    def merge(self, turn: int) -> None:
        case = self.case
        self.merged = self.payloads[turn % len(self.payloads)]
        # Into the one before the last, as the optimizer does where it pays.
        aggregate = ops.merge(self.merged, case.numel, case.k, case.wire_dtype, out=self.spare)
        self.spare = self.aggregate if self.device.type == "cpu" else None
        self.aggregate = aggregate

    def apply(self, turn: int) -> None:
        ops.apply_(self.split(self.params), self.aggregate, LR)

    def stages(self) -> list[Stage]:
        stages = [
            Stage("compress", self.compress),
            Stage("exchange", self.exchange, timed=False),
            Stage("merge", self.merge),
            Stage("apply", self.apply),
        ]
        if self.local is not None:
            stages.append(Stage("mask", self.mask))
        return stages

    # -------------------------------------------------------------------------------- figures

    def dense_aggregate(self) -> torch.Tensor:
        return ops.densify(self.aggregate, self.case.numel)

    def repairs(self) -> int:
        return ops.repairs(self.state)

    def touched(self) -> torch.Tensor:
        """Where the latest aggregate has an entry, be it zero: bool [numel]."""
        case = self.case
        touched = torch.zeros(case.numel, dtype=torch.bool, device=self.device)
        for payload in self.merged:
            touched[ops.unpack(payload, case.numel, case.k, case.wire_dtype)[0]] = True
        return touched
