"""What happens to the run, and when: drawn from the step's number, so that a step made again after
a resume is the same step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORKERS = 4
DENSITIES = (0.01, 0.03, 0.1, 0.6, 1.0)  # from about 0.4 on a bucket goes dense, as that is cheaper
RATES = (0.05, 0.02, 0.005, 0.0)
SHAPES = (((64, 48), (40, 32)), ((31, 33), (500,)), ((64,), (1,)))  # of three param groups


EXCHANGES = ("all_gather", "reduce_scatter")
LEAST_STEPS = 60
TIME_OUT = 6.0  # seconds, of the process group in a life in which a worker comes too late
# What happens to a worker in the last step of a life.
BETWEEN = "was killed between two collectives"
BEFORE_ANSWER = "was killed before it answered as an owner"
AFTER_APPLYING = "was killed after applying"
WHILE_SAVING = "was killed while saving"
TOO_LONG = "was paused past the time-out"
DAMAGED = "got a damaged payload"


@dataclass(frozen=True)
class Life:
    """What happens between a start of all workers and the end of them all.

    Attributes:
        size: number of workers.
        start: "fresh", "checkpoint" (gmc_cuda.checkpoint) or "average" (rank 0's averaged state).
        last: the last step, or the one in which something happens to a worker.
        victim, event: that worker's rank, and what happens to it; None: all stop by themselves.
        saves_average: what they leave when they stop, if not a checkpoint.
    """

    size: int
    start: str
    last: int
    victim: int | None = None
    event: str = ""
    saves_average: bool = False

    def ends(self, rank: int) -> str:
        """How a worker ends: "done", "killed", "damaged", or "lost" (the others, that is)."""
        if self.victim is None:
            return "done"
        if rank != self.victim or self.event == TOO_LONG:
            return "lost"
        return "damaged" if self.event == DAMAGED else "killed"


@dataclass(frozen=True)
class Plan:
    """Attributes: steps, seed: of the run; exchange: the optimizer's, one of EXCHANGES."""

    steps: int
    seed: int
    exchange: str

    @property
    def two_sided(self) -> bool:
        return self.exchange == "reduce_scatter"

    @property
    def save_every(self) -> int:
        return max(4, self.steps // 80)

    @property
    def every(self) -> int:
        """Steps between two changes of density or learning rate."""
        return max(5, self.steps // 50)

    def lives(self) -> list[Life]:
        many, few = WORKERS, WORKERS - 1
        ends: list[tuple[int, str, int | None, str]] = [
            (many, "fresh", 1, BETWEEN),
            (many, "checkpoint", 0, AFTER_APPLYING),
            *([(many, "checkpoint", 2, BEFORE_ANSWER)] if self.two_sided else []),
            (many, "checkpoint", 1, TOO_LONG),
            (many, "checkpoint", 3, WHILE_SAVING),
            (many, "checkpoint", None, ""),
            (many, "average", 2, DAMAGED),
            (many, "checkpoint", None, ""),
            (few, "checkpoint", None, ""),
            (many, "checkpoint", None, ""),
        ]
        lives = []
        for number, (size, start, victim, event) in enumerate(ends, 1):
            last = round(self.steps * number / len(ends))
            if event == WHILE_SAVING:
                last -= last % self.save_every
            if event == DAMAGED and last % self.every == 0:
                last += 1  # so that a payload is damaged, and not a notice of changed options
            averages = ends[number : number + 1] and ends[number][1] == "average"
            lives.append(Life(size, start, last, victim, event, bool(averages)))
        return lives

    def paused(self, step: int) -> int | None:
        """The worker that stops for a moment in the middle of this step."""
        if step % (4 * self.every) != self.every + 1 or self._ends_a_life(step):
            return None
        return self._drawn("paused", step)

    def damaged(self, step: int) -> tuple[int, int, int] | None:
        """The owner that gets a damaged payload in this step, its sender, and which byte.

        With an all-gather one worker alone knows of the damage, which ends a life: see DAMAGED.
        """
        if step % (4 * self.every) != self.every + 2 or self._ends_a_life(step):
            return None
        if not self.two_sided:
            return None
        return self._drawn("owner", step), self._drawn("sender", step), self.byte(step)

    def byte(self, step: int) -> int:
        """A byte of a header that says what the payload is: its format, its k, its size."""
        return random.Random(f"{self.seed} byte {step}").choice((0, 8, 12))

    def _ends_a_life(self, step: int) -> bool:
        return step in {life.last for life in self.lives()}

    def _drawn(self, what: str, step: int) -> int:
        """A rank that there is in every life."""
        return random.Random(f"{self.seed} {what} {step}").randrange(WORKERS - 1)

    def options(self, step: int) -> list[dict[str, float]]:
        """lr and density of each group. The second is never dense, so that something is always
        unsent; the third always is.
        """
        draw = random.Random(f"{self.seed} options {step // self.every}")
        lr = draw.choice(RATES if step % self.every < 3 else RATES[:-1])  # 0 for three steps
        return [
            {"lr": lr, "density": draw.choice(DENSITIES)},
            {"lr": lr * draw.choice((0.5, 1, 2)), "density": draw.choice(DENSITIES[:3])},
            {"lr": lr, "density": 1.0},
        ]

    def scaled(self, step: int) -> bool:
        """Whether a GradScaler makes this step."""
        return step // (2 * self.every) % 2 == 1

    def clipped(self, step: int) -> bool:
        return self.scaled(step) and step % 3 == 0

    def gradients(
        self, step: int, rank: int, params: list[Tensor]
    ) -> tuple[list[Any], dict[str, int]]:
        """This worker's gradients, None where it has none, and how many faults were put there."""
        draw = random.Random(f"{self.seed} gradients {step} {rank}")
        together = random.Random(f"{self.seed} missing {step}")
        generator = torch.Generator().manual_seed(1000 * (1000 * self.seed + step) + rank)
        grads: list[Any] = [
            0.1 * p.detach() + torch.randn(p.shape, generator=generator) for p in params
        ]
        faults = {"values that are not finite": 0, "missing gradients": 0}
        if draw.random() < 0.03:
            bad = draw.choice((float("nan"), float("inf"), float("-inf")))
            grad = draw.choice(grads).view(-1)
            grad[draw.randrange(grad.numel())] = bad
            faults["values that are not finite"] = 1
        missing = {i for i in range(len(params)) if draw.random() < 0.05}
        missing |= {i for i in range(len(params)) if together.random() < 0.04}  # on all workers
        if draw.random() < 0.02:
            missing = set(range(len(params)))
        for i in missing:
            grads[i] = None
        faults["missing gradients"] = len(missing)
        return grads, faults
