"""The methods that convergence.py compares, with p workers in one process.

A method is named "dense", "powersgd", "rule:dtype" as in "gmc:float4", or "rule:dtype:exchange" as
in "gmc:float4:reduce_scatter"; the exchange is an all-gather where none is named. With ":warmup"
behind that, the density falls to its value in the first steps, as by gmc_cuda.DensityWarmup. To
add a rule, write its row of RULES; to add an exchange, write its class and its row of EXCHANGES.
All else reads these tables.
"""

from __future__ import annotations

from argparse import Namespace
from bisect import bisect_right
from statistics import mean
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gmc_cuda import ops, reference
from gmc_cuda._engine import budget, ranges

DTYPES = {str(dtype).removeprefix("torch.").split("_")[0]: dtype for dtype in reference.WIRE_DTYPES}


WARMUP_SHARE, INITIAL_DENSITY = 0.1, 0.25  # of a warm-up of density: of the steps, of the entries


class Rule(NamedTuple):
    """A row of RULES.

    Attributes:
        said: what it is, for --help.
        starts: by task, (momentum, lr / (1 - momentum)) where a search starts. They come from
            earlier searches, because a good start saves runs.
        local_momentum: each worker has a momentum buffer of its own, else the aggregate gives it.
        masking: momentum factor masking.
        growing: memory_decay is not 1 but 1 + density.
        momenta: the momenta that may be tried; None for those of the command line.
    """

    said: str
    starts: dict[str, tuple[float, float]]
    local_momentum: bool = False
    masking: bool = False
    growing: bool = False
    momenta: list[float] | None = None


RULES = {
    "dense": Rule(
        "torch.optim.SGD on the mean gradient", {"text": (0.8, 2.56), "digits": (0.5, 1.28)}
    ),
    "powersgd": Rule(
        "torch.optim.SGD on PowerSGD's approximation of rank 4, as by torch's hook",
        {"text": (0.8, 2.56), "digits": (0.5, 1.28)},
    ),
    "gmc": Rule("global momentum", {"text": (0.5, 2.56), "digits": (0.5, 1.28)}),
    "growing": Rule(
        "global momentum, and a memory that grows: memory_decay = 1 + density",
        {"text": (0.3, 2.56), "digits": (0.3, 1.28)},
        growing=True,
    ),
    "dgc": Rule(
        "local momentum with momentum factor masking",
        {"text": (0.9, 10.24), "digits": (0.5, 1.28)},
        local_momentum=True,
        masking=True,
    ),
    "memsgd": Rule(
        "memory SGD with local momentum, which is DGC without masking",
        {"text": (0.5, 2.56), "digits": (0.5, 1.28)},
        local_momentum=True,
    ),
    "plain": Rule(
        "memory SGD without momentum",
        {"text": (0.0, 2.56), "digits": (0.0, 1.28)},
        momenta=[0.0],
    ),
}


class Method(Protocol):
    """Takes each worker's gradient in turn, from `.grad` of the parameters, then makes the step.

    Attributes:
        k: entries that a worker sends in a step, on average.
        nbytes: bytes that a worker hands to collectives in a step, on average.
    """

    k: float
    nbytes: float

    def bytes_ratio(self, numel: int) -> float: ...

    def take(self, rank: int) -> None: ...

    def finish(self, lr: float) -> None: ...


def entries_by_step(
    options: Namespace, numel: int, dtype: torch.dtype, warmup: bool, times: float = 1.0
) -> list[int]:
    """K of each step, of numel entries.

    Args:
        warmup: whether K falls exponentially to its value, as by gmc_cuda.DensityWarmup. That value
            is chosen so that a run sends as many bytes as without.
        times: see budget.entries.
    """
    ratio = None if options.density is not None else options.bytes_ratio
    steady = budget.entries(options.density, ratio, numel, dtype, times)
    steps = options.steps
    if not warmup:
        return [steady] * steps
    falling = max(1, round(WARMUP_SHARE * steps))

    def by_step(k: int) -> list[int]:
        first = max(INITIAL_DENSITY, k / numel)
        shares = [min(s / falling, 1.0) for s in range(steps)]
        return [budget.entries_at(first ** (1 - s) * (k / numel) ** s, numel) for s in shares]

    def nbytes(k: int) -> int:
        return sum(budget.payload_nbytes(numel, k, dtype) for k in by_step(k))

    allowed = steps * budget.payload_nbytes(numel, steady, dtype)
    k = bisect_right(range(1, steady), allowed, key=nbytes)
    if k == 0:
        raise ValueError(f"{allowed} bytes are too few for a warm-up of density in {steps} steps")
    return by_step(k)


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


class Dense:
    def __init__(self, params: list[nn.Parameter], momentum: float, options: Namespace) -> None:
        self.params, self.workers = params, options.workers
        self.optimizer = torch.optim.SGD(params, lr=0.0, momentum=momentum)
        self.sums = [torch.zeros_like(param) for param in params]
        self.k: float = sum(param.numel() for param in params)
        self.nbytes: float = 4 * self.k

    def bytes_ratio(self, numel: int) -> float:
        return 1.0

    def take(self, rank: int) -> None:
        for total, grad in zip(self.sums, gradients(self.params), strict=True):
            total += grad

    def finish(self, lr: float) -> None:
        for param, total in zip(self.params, self.sums):
            param.grad = total / self.workers
            total.zero_()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


class PowerSGD(Dense):
    """Low-rank approximation with error feedback and warm start, as in torch's powerSGD_hook.

    A weight of n x m elements is approximated by factors of n x 4 and m x 4 elements, unless those
    have more than half of its elements; then it is sent whole, as in the first steps.

    Source: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", algorithm 1.
    """

    RANK, WHOLE_STEPS = 4, 2

    def __init__(self, params: list[nn.Parameter], momentum: float, options: Namespace) -> None:
        super().__init__(params, momentum, options)
        self.step = 0
        sizes = [(param.size(0), param.numel() // param.size(0)) for param in params]
        self.low = [
            i for i, (n, m) in enumerate(sizes)
            if params[i].dim() > 1 and 2 * self.RANK * (n + m) < n * m
        ]  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.right = {i: torch.randn(sizes[i][1], self.RANK, generator=generator) for i in self.low}
        self.errors = [{i: torch.zeros(sizes[i]) for i in self.low} for _ in range(self.workers)]
        saved = sum(params[i].numel() - self.RANK * sum(sizes[i]) for i in self.low)
        self.k -= saved * max(0, options.steps - self.WHOLE_STEPS) / options.steps
        self.nbytes = 4 * self.k
        self.matrices: list[dict[int, Tensor]] = []

    def bytes_ratio(self, numel: int) -> float:
        return numel / self.k

    def take(self, rank: int) -> None:
        super().take(rank)
        errors = self.errors[rank]
        self.matrices.append(
            {i: errors[i] + self.params[i].grad.view_as(errors[i]) for i in self.low}  # type: ignore[union-attr]
        )

    def finish(self, lr: float) -> None:
        for i in self.low if self.step >= self.WHOLE_STEPS else []:
            right = torch.linalg.qr(self.right[i]).Q
            left = sum(worker[i] @ right for worker in self.matrices) / self.workers
            left = torch.linalg.qr(left).Q
            right = sum(worker[i].T @ left for worker in self.matrices) / self.workers
            self.right[i] = right
            approximation = left @ right.T
            for errors, worker in zip(self.errors, self.matrices, strict=True):
                errors[i] = worker[i] - approximation
            self.sums[i].copy_(self.workers * approximation.view_as(self.sums[i]))
        self.matrices.clear()
        self.step += 1
        super().finish(lr)


class Gathered:
    """All parameters are one bucket; the workers' payloads are gathered and merged."""

    def __init__(
        self,
        params: list[nn.Parameter],
        momentum: float,
        rule: Rule,
        dtype: torch.dtype,
        warmup: bool,
        options: Namespace,
    ) -> None:
        self.params, self.momentum, self.dtype = params, momentum, dtype
        self.numel = sum(param.numel() for param in params)
        self.workers, self.warmup, self.step = options.workers, warmup, 0
        self.memories = torch.zeros(options.workers, self.numel)
        self.buffers: list[Tensor | None] = [None] * options.workers
        if rule.local_momentum:
            self.buffers = list(torch.zeros(options.workers, self.numel))
        self.masking = rule.masking
        self.prepare(options)
        self.memory_decay = 1 + self.k / self.numel if rule.growing else 1.0

    def prepare(self, options: Namespace) -> None:
        """Sets how many entries and bytes are sent, and makes what the exchange keeps."""
        self.ks = self.entries(options, self.numel, times=max(self.workers, 2) / 2)
        self.k = mean(self.ks)
        self.nbytes = self.mean_nbytes(self.numel, self.ks)
        self.link_nbytes = (self.workers - 1) * self.nbytes
        self.states = [ops.select_state(self.numel, max(self.ks), "cpu") for _ in self.buffers]
        self.payloads: list[Tensor] = []
        self.aggregate: Tensor | None = None

    def bytes_ratio(self, numel: int) -> float:
        """How many times fewer bytes a link carries than with a ring all-reduce."""
        if self.workers == 1:
            return 4 * numel / self.nbytes
        return budget.ring_nbytes(4 * numel, self.workers) / self.link_nbytes

    def entries(self, options: Namespace, numel: int, times: float = 1.0) -> list[int]:
        return entries_by_step(options, numel, self.dtype, self.warmup, times)

    def mean_nbytes(self, numel: int, ks: list[int]) -> float:
        return mean(budget.payload_nbytes(numel, k, self.dtype) for k in ks)

    def take(self, rank: int) -> None:
        buffer, k = self.buffers[rank], self.ks[self.step]
        payload = ops.compress_(
            self.memories[rank],
            gradients(self.params),
            k,
            momentum=self.momentum,
            memory_decay=self.memory_decay,
            aggregate=self.aggregate if buffer is None else None,
            momentum_buffer=buffer,
            wire_dtype=self.dtype,
            state=self.states[rank],
        )
        if self.masking and buffer is not None:
            ops.mask_(buffer, payload, k, self.dtype)
        self.payloads.append(payload)

    def finish(self, lr: float) -> None:
        k = self.ks[self.step]
        self.aggregate = ops.merge(torch.stack(self.payloads), self.numel, k, self.dtype)
        self.payloads.clear()
        self.step += 1
        ops.apply_([param.data for param in self.params], self.aggregate, lr)


class TwoSided(Gathered):
    """Each range of the bucket goes to its owner, who sends its largest entries to all."""

    def prepare(self, options: Namespace) -> None:
        self.ranges = ranges.cut(self.numel, self.workers)
        self.ks_of = [self.entries(options, part.numel) for part in self.ranges]
        self.k = sum(mean(ks) for ks in self.ks_of)
        nbytes = [
            self.mean_nbytes(part.numel, ks)
            for part, ks in zip(self.ranges, self.ks_of, strict=True)
        ]
        self.nbytes = sum(nbytes) + nbytes[0]
        self.link_nbytes = sum(nbytes[1:]) + (self.workers - 1) * nbytes[0]
        self.owned = [torch.zeros(part.numel) for part in self.ranges]
        self.aggregates: list[Tensor | None] = [None] * self.workers
        self.received: list[list[Tensor]] = [[] for _ in self.ranges]
        self.state_of: dict[tuple[int, int], Tensor] = {}

    def state(self, rank: int, part: int) -> Tensor:
        """Of a worker's selection in a range; rank -1: of the owner's."""
        if (rank, part) not in self.state_of:
            numel, k = self.ranges[part].numel, max(self.ks_of[part])
            self.state_of[rank, part] = ops.select_state(numel, k, "cpu")
        return self.state_of[rank, part]

    def take(self, rank: int) -> None:
        grad = torch.cat([grad.view(-1) for grad in gradients(self.params)])
        buffer = self.buffers[rank]
        for j, (part, ks) in enumerate(zip(self.ranges, self.ks_of, strict=True)):
            k = ks[self.step]
            place = slice(part.begin, part.end)
            payload = ops.compress_(
                self.memories[rank][place],
                [grad[place]],
                k,
                momentum=0.0 if buffer is None else self.momentum,
                memory_decay=self.memory_decay,
                momentum_buffer=None if buffer is None else buffer[place],
                wire_dtype=self.dtype,
                state=self.state(rank, j),
            )
            if self.masking and buffer is not None:
                ops.mask_(buffer[place], payload, k, self.dtype)
            self.received[j].append(payload)

    def finish(self, lr: float) -> None:
        moved = []
        for j, (memory, ks) in enumerate(zip(self.owned, self.ks_of, strict=True)):
            k = ks[self.step]
            previous = self.aggregates[j]
            memory.mul_(self.memory_decay)
            if previous is not None and self.buffers[0] is None:
                ops.apply_([memory], previous, -self.momentum)
            mean = ops.merge(torch.stack(self.received[j]), memory.numel(), k, self.dtype)
            answer = ops.compress_(
                memory, [None], k, params=[memory], momentum=1.0, aggregate=mean,
                wire_dtype=self.dtype, state=self.state(-1, j),
            )  # fmt: skip
            self.received[j].clear()
            aggregate = ops.merge(answer[None], memory.numel(), k, self.dtype)
            self.aggregates[j] = aggregate
            moved.append(ops.densify(aggregate, memory.numel()))
        ops.apply_([param.data for param in self.params], ops.sparsify(torch.cat(moved)), lr)
        self.step += 1


WHOLE = {"dense": Dense, "powersgd": PowerSGD}
EXCHANGES = {"all_gather": Gathered, "reduce_scatter": TwoSided}
NAMES = [*WHOLE, *(f"{rule}:{dtype}{exchange}{warmup}" for rule in RULES if rule not in WHOLE
                   for dtype in DTYPES for exchange in ("", ":reduce_scatter")
                   for warmup in ("", ":warmup"))]  # fmt: skip


def rule_of(name: str) -> Rule:
    return RULES[name.partition(":")[0]]


def make(name: str, params: list[nn.Parameter], momentum: float, options: Namespace) -> Method:
    if name in WHOLE:
        return WHOLE[name](params, momentum, options)
    plain = name.removesuffix(":warmup")
    _, dtype, exchange = f"{plain}:all_gather".split(":")[:3]
    return EXCHANGES[exchange](
        params, momentum, rule_of(name), DTYPES[dtype], plain != name, options
    )
