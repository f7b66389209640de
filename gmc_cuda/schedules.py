"""Schedules over an optimizer's density."""

from __future__ import annotations

from typing import Any

import torch


class DensityWarmup:
    """Lowers the density exponentially from ``initial_density`` to each group's own.

    After step s of ``warmup_steps``: density = initial ** (1 - s / warmup) * target ** (s / warmup)
    so that DGC's 25 %, 6.25 %, 1.56 %, 0.4 %, 0.1 % is ``DensityWarmup(optimizer, 4)`` at a target
    of 0.1 %, stepped once an epoch. Groups whose target is no lower than ``initial_density`` keep
    it.

    Args:
        optimizer: a :class:`gmc_cuda.GMC` or :class:`gmc_cuda.DGC`; the densities it has now are
            the targets.
        warmup_steps: calls of :meth:`step` until the targets are reached, at least 1.
        initial_density: 0 < initial_density <= 1.

    It may be stepped at every iteration: the selection keeps its buffers and what it has learnt.
    With several workers all of them must step alike: a step with another density begins with a
    message of the size before, by which the workers compare it, and the host waits for that.

    Source: Lin et al., "Deep Gradient Compression", section 3.3.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        initial_density: float = 0.25,
    ) -> None:
        whole = isinstance(warmup_steps, int) and not isinstance(warmup_steps, bool)
        if not whole or warmup_steps < 1:
            raise ValueError(f"warmup_steps: got {warmup_steps!r}, must be an integer above 0")
        if not 0 < initial_density <= 1:
            raise ValueError(
                f"initial_density: got {initial_density!r}, must be above 0 and at most 1"
            )
        if any("density" not in group for group in optimizer.param_groups):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__} without a density, must be a "
                "gmc_cuda.GMC or gmc_cuda.DGC"
            )
        for g, group in enumerate(optimizer.param_groups):
            if group["density"] is None:
                raise ValueError(
                    f"optimizer: got bytes_ratio={group['bytes_ratio']} in param group {g}, must "
                    "have a density"
                )
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.initial_density = initial_density
        self.steps = 0
        self.targets = [group["density"] for group in optimizer.param_groups]
        self._write()

    def step(self) -> None:
        """Counts one step and writes the densities that belong to it."""
        self.steps += 1
        self._write()

    def get_last_density(self) -> list[float]:
        """The density of each param group."""
        return [group["density"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
        self._write()

    def _write(self) -> None:
        done = min(self.steps / self.warmup_steps, 1.0)
        groups = self.optimizer.param_groups
        for group, target in zip(groups, self.targets, strict=False):  # later groups are not ours
            if target < self.initial_density:
                reached = done == 1.0
                density = target if reached else self.initial_density ** (1 - done) * target**done
                group["density"] = density
