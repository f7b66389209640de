"""How GMC and DGC differ: options, how v is made, what is masked. Also the plan of a step.

Everything else (buckets, exchange, verdict, overlap) is common to both. Another method needs a
subclass of :class:`Rule`, and an optimizer that uses it, as in ``gmc_cuda/optim.py``.
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
from gmc_cuda._engine.ranges import cut

Group = dict[str, Any]


class Part(NamedTuple):
    """A range of a bucket in two-sided compression, and what is sent of it.

    Attributes:
        numel: elements of the range.
        k: number of entries sent.
        nbytes: size of their payload.
    """

    numel: int
    k: int
    nbytes: int


class Plan(NamedTuple):
    """How one bucket makes a step.

    Attributes:
        numel, k, wire_dtype: N, the entries sent, and the dtype of their values. They determine the
            payload's size.
        dense: whether v itself is summed by an all-reduce, instead of exchanging payloads.
        nbytes: bytes that this worker passes to the collectives.
        link_nbytes: bytes that it sends to other workers, and bytes that it receives from them.
        arguments: keyword arguments of ops.compress_ that say how v is made.
        masking: DGC's momentum factor masking.
        look_ahead: Nesterov's beta; None without Nesterov momentum.
        tag: identifies the step, see :func:`tag_of`; 0 for a single worker.
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

    def ranges(self) -> dict[str, Any]:
        """The ranges, as keyword arguments of operators."""
        return {"width": self.parts[0].numel, "last_k": self.parts[-1].k}

    def split(self, rank: int) -> tuple[list[int], int]:
        """The sizes of what a worker sends to each owner, and of what it gets from each worker."""
        return [part.nbytes for part in self.parts], self.parts[rank].nbytes

    def size(self) -> tuple[int, int, bool, int, int]:
        """The sizes that must be equal on all workers before their collectives meet."""
        return self.numel, self.k, self.dense, self.nbytes, len(self.parts)


_FIRST_TAG, _TAGS = 2, 2**24  # 0: no tag; 1: called off; float32 is exact below 2**24


def tag_of(*facts: Any) -> int:
    """A number that differs, very probably, between payloads that do not belong together.

    Args:
        facts: numbers, strings, None, and tensors (the values of those on a GPU do not count).
    """
    return _FIRST_TAG + hash(tuple(map(_as_number, facts))) % (_TAGS - _FIRST_TAG)


def _as_number(fact: Any) -> float:
    # hash() of strings and None differs from process to process.
    if isinstance(fact, (int, float)):
        return fact
    if isinstance(fact, Tensor):
        return float(fact) if fact.is_cpu else 0.0
    return zlib.crc32(repr(fact).encode())


_HOW_V_IS_MADE = (*(name for name, option in OPTIONS.items() if option.of_the_rule), "maximize")


class Rule:
    """The part of a method that GMC and DGC do not share.

    Attributes:
        options: the method's own options in a param group, with their defaults.
        compared: the options that must be equal on all workers at every step.
        local_momentum: whether each worker keeps a momentum buffer m. If not, all workers keep the
            last aggregate a_{t-1}.
    """

    options: ClassVar[dict[str, Any]] = {}
    compared: ClassVar[tuple[str, ...]] = (*OPTIONS, "maximize")
    local_momentum = False

    def plan(
        self, group: Group, bucket: Bucket, wire_dtype: torch.dtype, exchange: Exchange
    ) -> Plan:
        """The plan of a bucket's next step, without a tag.

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
            towards, own = sum(part.nbytes for part in parts), parts[rank].nbytes
            most, least = parts[0].nbytes, parts[-1].nbytes
            nbytes, back = towards + most, (size - 1) * most
            link = (towards - own + back, (size - 1) * own + back)
            busiest = max(towards - least, back) + back  # of any worker: all must decide alike
        else:
            k = budget.entries(density, ratio, numel, wire_dtype, max(size, 2) / 2)
            nbytes = budget.payload_nbytes(numel, k, wire_dtype)
            link = ((size - 1) * nbytes,) * 2
            busiest = link[0]
        without_range = bool(parts) and parts[-1].numel == 0
        dense = without_range or budget.dense_is_cheaper(numel, k, busiest, size)
        if dense:  # v, then two numbers for each rank and one for each parameter
            k, nbytes, parts = numel, 4 * (numel + 2 * size + len(bucket.params)), ()
            link = (budget.ring_nbytes(nbytes, size),) * 2
        return Plan(
            numel, k, wire_dtype, dense, nbytes, link,
            self.arguments(group), self.masks(group), self.look_ahead(group), parts=parts,
        )  # fmt: skip

    def check(self, group: Group, where: str) -> None:
        """Raises ValueError or TypeError for options out of range. Each step calls it."""

    def prepare(
        self, grads: Iterable[Tensor], exchange: Exchange, grad_scale: Tensor | None
    ) -> None:
        """Called with all of this worker's gradients before a step compresses any of them.

        Not for overlap=True, where gradients arrive one after the other.

        Args:
            grads: the gradients; those of sharded parameters as shards.
            grad_scale: the factor by which a GradScaler has multiplied them; None: 1.
        """

    @property
    def reads_gradients(self) -> bool:
        """Whether :meth:`prepare` reads the gradients, which must have been checked then."""
        return False

    def arguments(self, group: Group) -> dict[str, Any]:
        """How v is made: keyword arguments of ops.compress_."""
        return {name: as_float(group[name]) for name in _HOW_V_IS_MADE}

    def facts(self) -> dict[str, Any]:
        """Options outside param groups, which must be equal on all ranks."""
        return {}

    def check_facts(self, overlap: bool) -> None:
        """Raises ValueError or TypeError if an option of :meth:`facts` is out of range."""

    def look_ahead(self, group: Group) -> float | Tensor | None:
        """Nesterov's beta; None without Nesterov momentum."""
        return None

    def masks(self, group: Group) -> bool:
        """Whether local momentum is zeroed where an entry was sent."""
        return False

    def finish(self, group: Group) -> None:
        """Called with each group after a step."""

    def own_state(self) -> set[str]:
        """Names of the state that differs from worker to worker."""
        own = {"memory", "owner_memory"}
        return own | {"momentum_buffer"} if self.local_momentum else own

    def momentum_name(self, group: Group) -> str:
        """The key in optimizer.state of m or, with global momentum, of a_{t-1}."""
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
        elif isinstance(previous, Tensor):  # in place, so that a graph's replay does it too
            previous.copy_(lr)
        else:
            group["previous_lr"] = lr.clone()

    def momentum_name(self, group: Group) -> str:
        # In the buffer form a_{t-1} is torch.optim.SGD's momentum buffer.
        return "momentum_buffer" if group["momentum_form"] == "buffer" else "aggregate"


class LocalMomentum(Rule):
    """DGC: m = beta * m + g, v = u + m.

    Args:
        clip_norm: scale a worker's gradient to norm clip_norm / sqrt(p) if its norm is larger.
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

    @property
    def reads_gradients(self) -> bool:
        return self.clip_norm is not None

    def prepare(
        self, grads: Iterable[Tensor], exchange: Exchange, grad_scale: Tensor | None
    ) -> None:
        if self.clip_norm is None:
            return
        norm = exchange.sum_over_shards(_finite_norm(grads).square()).sqrt()
        scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(norm)
        limit = self.clip_norm / math.sqrt(exchange.size)
        # The operator divides by this: norm / limit clips, the loss scale alone unscales.
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
    """Every rank's range, with the entries that are sent of it in each direction.

    The last range may be the shortest; operators send no more of it than of the others.
    """
    parts: list[Part] = []
    for of in cut(numel, size):
        k = budget.entries(density, ratio, of.numel, wire_dtype) if of.numel else 0
        if parts:
            k = min(k, parts[0].k)
        nbytes = budget.payload_nbytes(of.numel, k, wire_dtype) if k else 0
        parts.append(Part(of.numel, k, nbytes))
    return tuple(parts)


def _ratio(previous_lr: float | Tensor, lr: float | Tensor) -> float | Tensor:
    """eta_{t-1} / eta_t, or 0 if eta_t is 0."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 0.0, previous_lr / lr)
    return 0.0 if lr == 0 else previous_lr / lr


def _finite_norm(grads: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all finite elements, in float64, where no square overflows."""
    norms = [
        torch.linalg.vector_norm(grad.nan_to_num(0.0, 0.0, 0.0), dtype=torch.float64)
        for grad in grads
    ]
    return (
        torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64, device="cpu")
    )
