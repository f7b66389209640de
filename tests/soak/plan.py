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


@dataclass(frozen=True)
class Life:
    """What happens between a start of all workers and the end of them all.

    Attributes:
        size: number of workers.
        start: "fresh", "checkpoint" (gmc_cuda.checkpoint) or "average" (rank 0's averaged state).
        last: the last step, or the one in which a worker is killed.
        killed, moment: which worker, and when in that step; None: they stop by themselves.
        saves_average: what they leave when they stop, if not a checkpoint.
    """

    size: int
    start: str
    last: int
    killed: int | None = None
    moment: str = ""
    saves_average: bool = False


@dataclass(frozen=True)
class Plan:
    steps: int
    seed: int

    @property
    def save_every(self) -> int:
        return max(4, self.steps // 80)

    @property
    def every(self) -> int:
        """Steps between two changes of density or learning rate."""
        return max(5, self.steps // 50)

    def lives(self) -> list[Life]:
        at = [round(self.steps * share) for share in (0.17, 0.33, 0.5, 0.67, 0.83)]
        saving = at[2] - at[2] % self.save_every  # a step that ends with a save
        return [
            Life(WORKERS, "fresh", at[0], killed=1, moment="between two collectives"),
            Life(WORKERS, "checkpoint", at[1], killed=0, moment="after applying"),
            Life(WORKERS, "checkpoint", saving, killed=3, moment="while saving"),
            Life(WORKERS, "checkpoint", at[3], saves_average=True),
            Life(WORKERS, "average", at[4]),
            Life(WORKERS - 1, "checkpoint", self.steps),
        ]

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
