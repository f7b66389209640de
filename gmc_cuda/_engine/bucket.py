"""Buckets: runs of parameters that share one flat index space 0..N-1, one memory, one payload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_not
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine.budget import ring_nbytes
from gmc_cuda._engine.device import is_capturing
from gmc_cuda._engine.owner import Owner
from gmc_cuda._engine.ranges import cut
from gmc_cuda._engine.shards import shard_of, shard_of_gradient

MAX_NUMEL = 2**31 - 1
# The dtypes that parameters and gradients may have.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_grad_of, _dtype_of = attrgetter("grad"), attrgetter("dtype")
_layout = attrgetter("dtype", "shape", "device")


class Bucket:
    """Parameters of one group and dtype with their float32 state, flat in storage order.

    Attributes:
        params: the parameters, in the order of the index space. A DTensor counts as its shard.
        group: their param group, the very dict that the user changes.
        sizes, numel: the parameters' numels, and their sum N.
        memory: u, float32 [N].
        momentum_buffer: m, float32 [N], with local momentum; else None.
        aggregate: a_{t-1} for global momentum: opaque uint8 after a sparse step, float32 [N] after
            a dense one, None before the first step and with local momentum.
        owner: the range of the bucket that this worker owns, with two-sided compression; else None.
        sent_nbytes, sent_entries: bytes and entries that the last step put into collectives.
        link_nbytes: bytes of the last step that were sent to, and received from, other workers.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        group: dict[str, Any],
        local_momentum: bool,
        owner: tuple[int, int] | None = None,
    ) -> None:
        self.params = list(params)
        self.group = group
        self.sizes = [shard_of(p).numel() for p in self.params]
        # A parameter may get another layout later, while its state still has the present one.
        self._layouts = [(shard_of(p).shape, shard_of(p).stride()) for p in self.params]
        self.numel = sum(self.sizes)
        self.device = shard_of(self.params[0]).device
        self._plain = all(shard_of(p) is p and p.is_contiguous() for p in self.params)
        self._places = _Places(self.params) if self._plain else None
        self.memory = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        self.momentum_buffer = torch.zeros_like(self.memory) if local_momentum else None
        self.aggregate: Tensor | None = None
        self._spare: Tensor | None = None  # the aggregate before that, for reuse
        self.owner: Owner | None = None
        if owner is not None:
            rank, size = owner
            self.owner = Owner(cut(self.numel, size)[rank], rank, size, self.device)
        self.sent_nbytes = self.sent_entries = 0
        self.link_nbytes = (0, 0)
        # By the number of ranges: the state of selections, and the largest k that it has room for.
        self._states: dict[int | None, tuple[Tensor, int]] = {}

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, each with the shape and layout of a parameter."""
        parts = flat.split(self.sizes)
        return [
            part.as_strided(*layout, part.storage_offset())
            for part, layout in zip(parts, self._layouts, strict=True)
        ]

    def vectors(self) -> dict[str, Tensor]:
        """Each worker's own flat tensors, by the name of their views in optimizer.state."""
        if self.momentum_buffer is None:
            return {"memory": self.memory}
        return {"memory": self.memory, "momentum_buffer": self.momentum_buffer}

    def flat_params(self) -> list[Tensor]:
        """The parameters as contiguous tensors that share their storage."""
        if self._plain:
            return list(self.params)
        params = map(shard_of, self.params)
        return [p if p.is_contiguous() else in_storage_order(p.detach()) for p in params]

    def param_places(self, look: bool = True) -> list[Tensor]:
        """The parameters as an operator's argument: as their addresses, where that is possible.

        Args:
            look: False if the parameters cannot have moved since the last call.
        """
        places = None if self._places is None else self._places.of(self.params, look)
        return self.flat_params() if places is None else places

    def forget_places(self) -> None:
        """Forgets the addresses, because parameters have moved."""
        if self._places is not None:
            self._places.forget()

    def plain_grads(self) -> list[Tensor | None] | None:
        """The gradients, unchecked; None if one is missing or a parameter needs a view.

        The operator that gets them checks them.
        """
        grads: list[Tensor | None] = list(map(_grad_of, self.params))
        return grads if self._plain and all(map(is_not, grads, repeat(None))) else None

    def flat_grads(self, refuse: Callable[[Tensor], None]) -> list[Tensor | None]:
        """The gradients as an operator takes them: contiguous, in storage order.

        Args:
            refuse: raises; called with a parameter whose gradient is sparse or of an unknown dtype.
        """
        # A step has hundreds of gradients, so the usual case takes no Python code for each.
        grads: list[Tensor | None] = list(map(_grad_of, self.params))
        if self._plain and _all_plain(grads):
            return grads
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is not None:
                if grad.layout is not torch.strided or grad.dtype not in DTYPES:
                    refuse(param)
                grads[i] = _flat_grad(param, grad)
        return grads

    def bump_versions(self) -> None:
        """Tells autograd that the parameters were changed in place, which operators do not."""
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.params)

    def forget_grads(self) -> None:
        """Sets gradients to None, so that what is in memory is not added again."""
        for param in self.params:
            param.grad = None

    def flat_values(self, values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """The tensors in the bucket's order, flat, sharing their storage where possible."""
        return [_flat_grad(p, values[p]) for p in self.params]

    def select_state(self, k: int, numel: int | None = None, ranges: int | None = None) -> Tensor:
        """The selection's state, with room for this k. Its guess survives a change of k.

        Args:
            numel: how many elements are selected from, in each range; None: all of the bucket.
            ranges: how many ranges of the bucket are selected from; None: a single one, or all of
                the bucket.

        Raises:
            RuntimeError: a CUDA graph is being captured, and k is larger than ever before.
        """
        state, largest_k = self._states.get(ranges, (None, 0))
        if state is None or k > largest_k:
            if is_capturing(self.memory):
                raise RuntimeError("make a step of the largest density before capturing any")
            state = ops.select_state(numel or self.numel, k, self.device, state, ranges)
            self._states[ranges] = state, k
        return state

    def count_repairs(self) -> int:
        return sum(ops.repairs(state) for state, _ in self._states.values())

    def fold_owner(self) -> None:
        """Moves the owner memory into this worker's memory."""
        if self.owner is not None:
            self.owner.fold_into(self.memory)

    def keep_aggregate(self, aggregate: Tensor) -> None:
        """Makes this a_{t-1} of the next step."""
        if aggregate is self.aggregate:  # it is kept already, and must not be overwritten
            return
        if not is_capturing(aggregate):
            if aggregate.is_cpu:  # CUDA's caching allocator makes reuse needless
                self._spare = self.aggregate
            self.aggregate = aggregate
        elif self.aggregate is None or self.aggregate.shape != aggregate.shape:
            raise RuntimeError("make a step of the same density before capturing one in a graph")
        else:  # a replay reads the tensor that the capture read
            self.aggregate.copy_(aggregate)

    def spare_aggregate(self, nbytes: int) -> Tensor | None:
        """An aggregate of this size that may be overwritten, or None."""
        spare, self._spare = self._spare, None
        fits = spare is not None and spare.dtype == torch.uint8 and spare.numel() == nbytes
        return spare if fits else None

    def sparse_aggregate(self) -> Tensor | None:
        """a_{t-1} as an aggregate for ops.compress_."""
        if self.aggregate is not None and self.aggregate.dtype == torch.float32:
            self.aggregate = ops.sparsify(self.aggregate)
        return self.aggregate

    def dense_aggregate(self) -> Tensor | None:
        """a_{t-1} as float32 [N]."""
        if self.aggregate is not None and self.aggregate.dtype == torch.uint8:
            return ops.densify(self.aggregate, self.numel)
        return self.aggregate

    def momentum(self) -> Tensor:
        """a_{t-1} as float32 [N], zero before the first step."""
        dense = self.dense_aggregate()
        return torch.zeros_like(self.memory) if dense is None else dense


def figures(
    buckets: Sequence[Bucket], steps: int, skipped: Tensor | None, size: int
) -> dict[str, Any]:
    """The statistics for ``GMC.stats``; reads the device. ``size`` is the world size p."""
    sent = sum(bucket.sent_nbytes for bucket in buckets)
    numel = sum(bucket.numel for bucket in buckets)
    return {
        "steps": steps,
        "skipped_steps": 0 if skipped is None else int(skipped),
        "bytes_per_step": sent,
        "link_bytes_sent": sum(bucket.link_nbytes[0] for bucket in buckets),
        "link_bytes_received": sum(bucket.link_nbytes[1] for bucket in buckets),
        "dense_bytes_per_step": 4 * numel,
        "bytes_ratio": _bytes_ratio(buckets, 4 * numel, size),
        "density": sum(bucket.sent_entries for bucket in buckets) / max(1, numel),
        "repairs": sum(bucket.count_repairs() for bucket in buckets),
    }


def _bytes_ratio(buckets: Sequence[Bucket], dense_nbytes: int, size: int) -> float:
    """How many times fewer bytes a link carried than for a ring all-reduce of the gradient.

    A single worker has no link, and counts as one of two.
    """
    sent = sum(bucket.sent_nbytes for bucket in buckets)
    if size == 1 or not sent:
        return dense_nbytes / sent if sent else 0.0
    link = max(sum(bucket.link_nbytes[i] for bucket in buckets) for i in (0, 1))
    return ring_nbytes(dense_nbytes, size) / link


def make_buckets(
    params: Sequence[Tensor],
    group: dict[str, Any],
    cap_numel: int,
    local_momentum: bool,
    owner: tuple[int, int] | None = None,
) -> list[Bucket]:
    """Packs parameters into buckets of at most cap_numel elements, the last parameters first.

    The backward pass produces gradients from the last layer to the first, so the buckets come in
    the order in which they fill. A parameter larger than the cap gets a bucket of its own.

    Args:
        owner: this worker's rank and the world size, with two-sided compression.
    """
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    for param in reversed(params):
        if shard_of(param).numel() == 0:
            continue
        packs = by_dtype.setdefault(param.dtype, [[]])
        if packs[-1] and sum(shard_of(p).numel() for p in (*packs[-1], param)) > cap_numel:
            packs.append([])
        packs[-1].append(param)
    return [
        Bucket(_aligned_first(pack), group, local_momentum, owner)
        for packs in by_dtype.values()
        for pack in packs
    ]


def _aligned_first(params: list[Tensor]) -> list[Tensor]:
    # After a numel that is not a multiple of 8, no tensor could be read by 16-byte loads.
    return sorted(params, key=lambda p: shard_of(p).numel() % 8 != 0)


def is_dense_layout(tensor: Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlaps, in any order."""
    expected = 1
    for size, stride in sorted(
        zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]
    ):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def in_storage_order(tensor: Tensor) -> Tensor:
    """A tensor of dense layout as a contiguous 1-D view of its storage."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class _Places:
    """The addresses of a bucket's parameters, for an operator.

    A step passes hundreds of parameters, and to pass a tensor takes half a microsecond; a list of
    addresses is one tensor.

    Args:
        params: contiguous parameters.
    """

    _MAGIC = int.from_bytes(b"gcplaces", "little")  # csrc/torch/segments.h
    _CODES: ClassVar[dict[torch.dtype, int]] = {
        torch.float32: 0, torch.bfloat16: 1, torch.float16: 2
    }  # fmt: skip

    def __init__(self, params: Sequence[Tensor]) -> None:
        codes = [(p.numel(), self._CODES[p.dtype]) for p in params]
        kinds = [self._MAGIC, *chain.from_iterable(codes)]
        self._kinds = torch.tensor(kinds, dtype=torch.int64, device="cpu")
        self._layouts = list(map(_layout, params))
        self.forget()
        self._use = len(params) > 4 and params[0].device.type in ("cpu", "cuda")

    def forget(self) -> None:
        self._addresses: list[int] = []
        self._written: list[Tensor] = []

    def of(self, params: Sequence[Tensor], look: bool) -> list[Tensor] | None:
        """The addresses and the dtypes, as two tensors; None if the tensors must be passed.

        Args:
            look: whether the parameters may have moved.
        """
        if not self._use or torch.compiler.is_compiling():
            return None
        if self._written and not look:
            return self._written
        addresses = list(map(Tensor.data_ptr, params))
        if addresses != self._addresses:
            contiguous = all(map(Tensor.is_contiguous, params))
            if not contiguous or list(map(_layout, params)) != self._layouts:
                return None
            written = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            self._addresses, self._written = addresses, [written, self._kinds]
        return self._written


def _all_plain(grads: list[Any]) -> bool:
    """Whether all are contiguous tensors of a known dtype; False if one is None."""
    try:
        return DTYPES.issuperset(map(_dtype_of, grads)) and all(map(Tensor.is_contiguous, grads))
    except (AttributeError, TypeError, RuntimeError):  # a None, or a sparse layout without strides
        return False


def _flat_grad(param: Tensor, grad: Tensor) -> Tensor:
    param, grad = shard_of(param), shard_of_gradient(param, grad)
    if grad.is_contiguous() and param.is_contiguous():
        return grad
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return in_storage_order(grad)
