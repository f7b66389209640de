"""Update rules: what a worker adds to its memory, and what it keeps for that besides memory.

A rule of one's own is a subclass of :class:`Rule` and an optimizer (``optim.py``) that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmc_cuda.hyperparameters import check_positive

Group = dict[str, Any]


class Rule:
    """The part of a method that the optimizer does not share with others.

    Attributes:
        options: its options in a param group, with their defaults.
        local_momentum: whether each worker keeps a momentum buffer m. If not, the last aggregate
            a_{t-1} is kept, which all workers have in common.
    """

    options: ClassVar[dict[str, Any]] = {}
    local_momentum = False

    def check(self, group: Group, where: str) -> None:
        """Raises ValueError or TypeError for options out of range; called at every step."""

    def prepare(self, grads: Iterable[Tensor], size: int, grad_scale: Tensor | None) -> None:
        """Sees the worker's whole gradient before any of it is sent; without overlap only."""

    def arguments(self, group: Group) -> dict[str, Any]:
        """How v is made: keyword arguments of ops.compress_, and memory_decay."""
        return {
            "memory_decay": group["memory_decay"],
            "momentum": group["momentum"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
        }

    def facts(self) -> dict[str, Any]:
        """Its options besides those of param groups, which must be equal on all ranks."""
        return {}

    def check_facts(self, overlap: bool) -> None:
        """Raises ValueError or TypeError for one of these that is out of range."""

    def look_ahead(self, group: Group) -> float | Tensor | None:
        """Nesterov's beta where a_t is applied; None without."""
        return None

    def masks(self, group: Group) -> bool:
        """Whether momentum is zeroed where an entry was sent; with local momentum only."""
        return False

    def finish(self, group: Group) -> None:
        """Called for each group when a step has been made."""

    def own_state(self) -> set[str]:
        """Names of the state that differs from worker to worker."""
        return {"memory", "momentum_buffer"} if self.local_momentum else {"memory"}

    def aggregate_name(self, group: Group) -> str:
        """The name of a_{t-1} in a state_dict, which all workers have in common."""
        return "aggregate"


class GlobalMomentum(Rule):
    """GMC: v = u + g + beta * a_{t-1}."""

    options: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "momentum_form": "buffer",
        "previous_lr": None,
    }

    def check(self, group: Group, where: str) -> None:
        form = group["momentum_form"]
        if form not in ("buffer", "iterate"):
            raise ValueError(f"momentum_form {where}: got {form!r}, must be 'buffer' or 'iterate'")

    def arguments(self, group: Group) -> dict[str, Any]:
        arguments = super().arguments(group)
        if group["momentum_form"] == "iterate" and group["previous_lr"] is not None:
            arguments["momentum"] = group["momentum"] * _ratio(group["previous_lr"], group["lr"])
        return arguments

    def look_ahead(self, group: Group) -> float | Tensor | None:
        return group["momentum"] if group["nesterov"] else None

    def finish(self, group: Group) -> None:
        lr, previous = group["lr"], group["previous_lr"]
        if not isinstance(lr, Tensor):
            group["previous_lr"] = lr
        elif isinstance(previous, Tensor):  # in place, so that a replayed graph does it too
            previous.copy_(lr)
        else:
            group["previous_lr"] = lr.clone()

    def aggregate_name(self, group: Group) -> str:
        # In this form a_{t-1} is what torch.optim.SGD calls its momentum buffer.
        return "momentum_buffer" if group["momentum_form"] == "buffer" else "aggregate"


class LocalMomentum(Rule):
    """DGC: m = beta * m + g, v = u + m.

    Args:
        clip_norm: scales the worker's gradient to norm clip_norm / sqrt(p) where it is larger.
    """

    options: ClassVar[dict[str, Any]] = {"nesterov": False, "momentum_masking": True}
    local_momentum = True

    def __init__(self, clip_norm: float | None) -> None:
        self.clip_norm = clip_norm
        self._clip_scale: Tensor | None = None

    def facts(self) -> dict[str, Any]:
        return {"clip_norm": self.clip_norm}

    def check_facts(self, overlap: bool) -> None:
        if self.clip_norm is None:
            return
        check_positive(self.clip_norm, "clip_norm", "number or None")
        if overlap:
            raise ValueError(
                "clip_norm: got a number with overlap=True, but the norm of the whole gradient is "
                "known only after the backward pass: use overlap=False"
            )

    def prepare(self, grads: Iterable[Tensor], size: int, grad_scale: Tensor | None) -> None:
        if self.clip_norm is None:
            return
        norm = _finite_norm(grads)
        scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(norm)
        limit = self.clip_norm / math.sqrt(size)
        # Dividing by norm / limit is the scaling; a smaller gradient is only unscaled.
        self._clip_scale = torch.maximum(scale, norm / limit).float()

    def arguments(self, group: Group) -> dict[str, Any]:
        arguments = super().arguments(group) | {"nesterov": group["nesterov"]}
        if self.clip_norm is not None:
            arguments["grad_scale"] = self._clip_scale
        return arguments

    def masks(self, group: Group) -> bool:
        return bool(group["momentum_masking"])


def _ratio(previous_lr: float | Tensor, lr: float | Tensor) -> float | Tensor:
    """eta_{t-1} / eta_t, zero where eta_t is."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 0.0, previous_lr / lr)
    return 0.0 if lr == 0 else previous_lr / lr


def _finite_norm(grads: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all finite elements, float64, so that no square overflows."""
    norms = [
        torch.linalg.vector_norm(grad.nan_to_num(0.0, 0.0, 0.0), dtype=torch.float64)
        for grad in grads
    ]
    return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)
