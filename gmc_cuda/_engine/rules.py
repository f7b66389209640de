"""What distinguishes GMC from DGC: options, how v is made, what is masked; and a step's plan.

Everything else (buckets, exchange, verdict, overlap) is common to both. A rule of one's own is a
subclass of :class:`Rule` and an optimizer (``gmc_cuda/optim.py``) that uses it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gmc_cuda._engine import budget
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.checks import OPTIONS, as_float, check_positive
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.ranges import Range, cut

Group = dict[str, Any]


class Part(NamedTuple):
    """A range of a bucket in two-sided compression, and what is sent of it.

    Attributes:
        begin, end: its elements.
        k: entries sent.
        nbytes: size of their payload.
    """

    begin: int
    end: int
    k: int
    nbytes: int

    @property
    def range(self) -> Range:
        return Range(self.begin, self.end)

    @property
    def numel(self) -> int:
        return self.end - self.begin


class Plan(NamedTuple):
    """How one bucket makes a step.

    Attributes:
        numel, k, wire_dtype: what fixes the payload's size: N, entries sent, dtype of the values.
        dense: whether v itself is summed, instead of gathering payloads.
        nbytes: what this worker hands to the collectives: the payload's size where it is sparse.
        link_nbytes: what it sends to other workers of that, and what it receives from them.
        arguments: keyword arguments of ops.compress_ that say how v is made.
        masking: DGC's momentum factor masking.
        look_ahead: Nesterov's beta where a_t is applied; None without.
        tag: says whose step this is, see :func:`tag_of`; 0 where there is nobody to compare with.
        parts: each rank's range of the bucket with two-sided compression; else empty.
    """

    numel: int
    k: int
    wire_dtype: torch.dtype
    dense: bool
    nbytes: int
    link_nbytes: tuple[int, int]
    arguments: dict[str, Any]
    masking: bool = False
    look_ahead: float | Tensor | None = None
    tag: int = 0
    parts: tuple[Part, ...] = ()

    def size(self) -> tuple[int, int, bool, int, int]:
        """What the workers must agree on before their collectives can meet."""
        return self.numel, self.k, self.dense, self.nbytes, len(self.parts)


_FIRST_TAG, _TAGS = 2, 2**24  # below: not tagged, called off; above: not exact in a float32


def tag_of(*facts: Any) -> int:
    """A number by which payloads that do not belong together are told apart, the same everywhere.

    Args:
        facts: numbers, strings, None and tensors, those on a GPU without their values.
    """
    return _FIRST_TAG + hash(tuple(map(_as_number, facts))) % (_TAGS - _FIRST_TAG)


def _as_number(fact: Any) -> float:
    # Not hash(): of strings and None it is another one in each process.
    if isinstance(fact, (int, float)):
        return fact
    if isinstance(fact, Tensor):
        return float(fact) if fact.is_cpu else 0.0
    return zlib.crc32(repr(fact).encode())


_HOW_V_IS_MADE = (*(name for name, option in OPTIONS.items() if option.of_the_rule), "maximize")


class Rule:
    """The part of a method that the optimizer does not share with others.

    Attributes:
        options: its options in a param group, with their defaults.
        agreed: the options that all workers must have alike at every step.
        local_momentum: whether each worker keeps a momentum buffer m. If not, the last aggregate
            a_{t-1} is kept, which all workers have in common.
    """

    options: ClassVar[dict[str, Any]] = {}
    compared: ClassVar[tuple[str, ...]] = (*OPTIONS, "maximize")
    local_momentum = False

    def plan(
        self, group: Group, bucket: Bucket, wire_dtype: torch.dtype, exchange: Exchange
    ) -> Plan:
        """A bucket's next step, still without its tag.

        Args:
            group: the bucket's options.
            exchange: the workers.
        """
        numel, size, rank = bucket.numel, exchange.size, exchange.rank
        density, ratio = group["density"], group.get("bytes_ratio")
        parts: tuple[Part, ...] = ()
        if bucket.owner is not None:
            parts = _parts(density, ratio, numel, wire_dtype, size)
            k = sum(part.k for part in parts)
            towards, back = [part.nbytes for part in parts], parts[0].nbytes
            nbytes = sum(towards) + back
            link = (sum(towards) - towards[rank], (size - 1) * towards[rank])
            link = (link[0] + (size - 1) * back, link[1] + (size - 1) * back)
            dense = budget.dense_is_cheaper(numel, k, max(link), size)
            dense = dense or parts[-1].numel == 0
        else:
            k = budget.entries(density, ratio, numel, wire_dtype, max(size, 2) / 2)
            nbytes = budget.payload_nbytes(numel, k, wire_dtype)
            link = ((size - 1) * nbytes, (size - 1) * nbytes)
            dense = budget.dense_is_cheaper(numel, k, max(link), size)
        if dense:  # v, two numbers for each rank and one for each parameter
            k, nbytes, parts = numel, 4 * (numel + 2 * size + len(bucket.params)), ()
            link = (budget.ring_nbytes(nbytes, size),) * 2
        return Plan(
            numel, k, wire_dtype, dense, nbytes, link,
            self.arguments(group), self.masks(group), self.look_ahead(group), parts=parts,
        )  # fmt: skip

    def check(self, group: Group, where: str) -> None:
        """Raises ValueError or TypeError for options out of range; called at every step."""

    def prepare(
        self, grads: Iterable[Tensor], exchange: Exchange, grad_scale: Tensor | None
    ) -> None:
        """Sees this worker's gradients before any of them is sent; without overlap only.

        Args:
            grads: of a sharded parameter the local part.
            grad_scale: what a GradScaler has multiplied them by.
        """

    def arguments(self, group: Group) -> dict[str, Any]:
        """How v is made: keyword arguments of ops.compress_."""
        return {name: as_float(group[name]) for name in _HOW_V_IS_MADE}

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
        own = {"memory", "owner_memory"}
        return own | {"momentum_buffer"} if self.local_momentum else own

    def momentum_name(self, group: Group) -> str:
        """The name in state of m or, where momentum is global, of a_{t-1}."""
        return "momentum_buffer"


class GlobalMomentum(Rule):
    """GMC: v = u + g + beta * a_{t-1}."""

    options: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "momentum_form": "buffer",
        "previous_lr": None,
    }
    compared: ClassVar[tuple[str, ...]] = (*Rule.compared, "nesterov", "momentum_form")

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

    def momentum_name(self, group: Group) -> str:
        # In the buffer form a_{t-1} is what torch.optim.SGD calls its momentum buffer.
        return "momentum_buffer" if group["momentum_form"] == "buffer" else "aggregate"


class LocalMomentum(Rule):
    """DGC: m = beta * m + g, v = u + m.

    Args:
        clip_norm: scales the worker's gradient to norm clip_norm / sqrt(p) where it is larger.
    """

    options: ClassVar[dict[str, Any]] = {"nesterov": False, "momentum_masking": True}
    compared: ClassVar[tuple[str, ...]] = (*Rule.compared, *options)
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

    def prepare(
        self, grads: Iterable[Tensor], exchange: Exchange, grad_scale: Tensor | None
    ) -> None:
        if self.clip_norm is None:
            return
        norm = exchange.sum_over_shards(_finite_norm(grads).square()).sqrt()
        scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(norm)
        limit = self.clip_norm / math.sqrt(exchange.size)
        # Dividing by norm / limit is the scaling; a smaller gradient is only unscaled.
        self._clip_scale = torch.maximum(scale, norm / limit).float()

    def arguments(self, group: Group) -> dict[str, Any]:
        arguments = super().arguments(group) | {"nesterov": group["nesterov"]}
        if self.clip_norm is not None:
            arguments["grad_scale"] = self._clip_scale
        return arguments

    def masks(self, group: Group) -> bool:
        return bool(group["momentum_masking"])


@lru_cache(maxsize=4096)
def _parts(
    density: float | None, ratio: float | None, numel: int, wire_dtype: torch.dtype, size: int
) -> tuple[Part, ...]:
    """Every rank's range, with the entries that are sent of it in either direction."""
    parts = []
    for of in cut(numel, size):
        k = budget.entries(density, ratio, of.numel, wire_dtype) if of.numel else 0
        nbytes = budget.payload_nbytes(of.numel, k, wire_dtype) if k else 0
        parts.append(Part(*of, k, nbytes))
    return tuple(parts)


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
    return (
        torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64, device="cpu")
    )
