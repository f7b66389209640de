"""Schedules over an optimizer's density."""

from __future__ import annotations

from typing import Any

import torch


class DensityWarmup:
    """Lowers the density exponentially from ``initial_density`` to each group's own.

    After step s the density is ``initial ** (1 - s / warmup) * target ** (s / warmup)``. DGC's
    25 %, 6.25 %, 1.56 %, 0.4 %, 0.1 % is ``DensityWarmup(optimizer, 4)`` over a density of 0.1 %,
    stepped once an epoch. A group whose target is ``initial_density`` or more keeps its density.

    All workers must step it alike. It may be stepped at every iteration, but a change of density
    costs the next optimizer step one extra message, in which the workers compare the new sizes and
    for which the host waits.

    Args:
        optimizer: a :class:`gmc_cuda.GMC` or :class:`gmc_cuda.DGC`, whose present densities are
            the targets.
        warmup_steps: calls of :meth:`step` until the targets are reached, at least 1.
        initial_density: the density before the first step, 0 < initial_density <= 1.

    Raises:
        ValueError: an argument out of range, or a param group that has a bytes_ratio instead of a
            density.
        TypeError: an optimizer without a density.

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
        """Counts one step and sets each group's density for it."""
        self.steps += 1
        self._write()

    def get_last_density(self) -> list[float]:
        """The density that each param group has now."""
        return [group["density"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
        self._write()

    def _write(self) -> None:
        done = min(self.steps / self.warmup_steps, 1.0)
        groups = self.optimizer.param_groups
        for group, target in zip(groups, self.targets, strict=False):  # added later: no target
            if target < self.initial_density:
                reached = done == 1.0
                density = target if reached else self.initial_density ** (1 - done) * target**done
                group["density"] = density
