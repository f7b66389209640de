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
from gmc_cuda._engine.owner import Owner
from gmc_cuda._engine.ranges import Range, cut
from gmc_cuda._engine.shards import shard_of, shard_of_gradient

MAX_NUMEL = 2**31 - 1
# Of parameters and gradients.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_grad_of, _dtype_of = attrgetter("grad"), attrgetter("dtype")
_layout = attrgetter("dtype", "shape", "device")


class Bucket:
    """Parameters of one group and dtype with their float32 state, flat in storage order.

    Attributes:
        params: the parameters, in the order of the index space. Of a DTensor, the local shard is
            meant everywhere.
        group: the options of their param group, the very dict that the user changes.
        sizes, numel: the parameters' numels, and their sum N.
        memory: u, float32 [N].
        momentum_buffer: m, float32 [N], with local momentum; else None.
        aggregate: a_{t-1} for global momentum: opaque uint8 after a sparse step, float32 [N] after
            a dense one, None before the first step and with local momentum.
        owner: the range of the bucket that this worker owns, with two-sided compression; else None.
        sent_nbytes, sent_entries: put into the collectives at the last step.
        link_nbytes: what was sent to other workers of that, and what was received from them.
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
        # As they are now: a parameter may be laid out anew while its state is still as before.
        self._layouts = [(shard_of(p).shape, shard_of(p).stride()) for p in self.params]
        self.numel = sum(self.sizes)
        self.device = shard_of(self.params[0]).device
        self._plain = all(shard_of(p) is p and p.is_contiguous() for p in self.params)
        self._places = _Places(self.params) if self._plain else None
        self.memory = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        self.momentum_buffer = torch.zeros_like(self.memory) if local_momentum else None
        self.aggregate: Tensor | None = None
        self._spare: Tensor | None = None  # the one before it
        self.owner: Owner | None = None
        if owner is not None:
            rank, size = owner
            self.owner = Owner(cut(self.numel, size)[rank], rank, size, self.device)
        self.sent_nbytes = self.sent_entries = 0
        self.link_nbytes = (0, 0)
        self._states: dict[Range | None, Tensor] = {}
        self._states_k: dict[Range | None, int] = {}

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor's parts, each with the shape and layout of its parameter."""
        parts = flat.split(self.sizes)
        return [
            part.as_strided(*layout, part.storage_offset())
            for part, layout in zip(parts, self._layouts, strict=True)
        ]

    def vectors(self) -> dict[str, Tensor]:
        """The flat tensors that a worker keeps for itself, by the name of their views in state."""
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
        """The same for an operator, perhaps as the places where they are.

        Args:
            look: False where the parameters are known to be where they were.
        """
        places = None if self._places is None else self._places.of(self.params, look)
        return self.flat_params() if places is None else places

    def forget_places(self) -> None:
        """The parameters lie elsewhere."""
        if self._places is not None:
            self._places.forget()

    def plain_grads(self) -> list[Tensor | None] | None:
        """The gradients as they are, if each of the parameters, which are plain, has one.

        They were not looked at: an operator may find that it cannot take them.
        """
        grads: list[Tensor | None] = list(map(_grad_of, self.params))
        return grads if self._plain and all(map(is_not, grads, repeat(None))) else None

    def flat_grads(self, refuse: Callable[[Tensor], None]) -> list[Tensor | None]:
        """The gradients as an operator takes them.

        refuse(param) is called where a gradient is no dense tensor of a known dtype, and raises.
        """
        # There are hundreds at every step, so the common case is recognised without a line of
        # Python for each.
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
        """That the parameters were changed in place, which an operator cannot."""
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.params)

    def forget_grads(self) -> None:
        """What was taken in must not be taken in again."""
        for param in self.params:
            param.grad = None

    def flat_values(self, values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Tensors shaped like the parameters, in the same order, sharing storage if they can."""
        return [_flat_grad(p, values[p]) for p in self.params]

    def select_state(self, k: int, of: Range | None = None) -> Tensor:
        """The selection's state, with room for this k; what it has learnt outlives a change of k.

        Args:
            of: the range that is selected from. None: the whole bucket or, with two-sided
                compression, what this worker owns of it.

        Raises:
            RuntimeError: while a graph is captured and k is larger than ever before.
        """
        state = self._states.get(of)
        if state is None or k > self._states_k[of]:
            if self.memory.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("make a step of the largest density before capturing any")
            state = ops.select_state(self.numel if of is None else of.numel, k, self.device, state)
            self._states[of], self._states_k[of] = state, k
        return state

    def count_repairs(self) -> int:
        return sum(map(ops.repairs, self._states.values()))

    def fold_owner(self) -> None:
        """Moves what this worker owns of the bucket into its own memory."""
        if self.owner is not None:
            self.owner.fold_into(self.memory)

    def keep_aggregate(self, aggregate: Tensor) -> None:
        """Makes this a_{t-1} of the next step."""
        if not (aggregate.is_cuda and torch.cuda.is_current_stream_capturing()):
            if aggregate.is_cpu:  # a GPU's allocator has it at hand by itself
                self._spare = self.aggregate
            self.aggregate = aggregate
        elif self.aggregate is None or self.aggregate.shape != aggregate.shape:
            raise RuntimeError("make a step of the same density before capturing one in a graph")
        else:  # a replay reads what the capture read, so it must be in the same place
            self.aggregate.copy_(aggregate)

    def spare_aggregate(self, nbytes: int) -> Tensor | None:
        """An aggregate of this size that nothing reads any more, to be overwritten."""
        spare, self._spare = self._spare, None
        fits = spare is not None and spare.dtype == torch.uint8 and spare.numel() == nbytes
        return spare if fits else None

    def sparse_aggregate(self) -> Tensor | None:
        """a_{t-1} as compress_ takes it."""
        if self.aggregate is not None and self.aggregate.dtype == torch.float32:
            self.aggregate = ops.sparsify(self.aggregate)
        return self.aggregate

    def dense_aggregate(self) -> Tensor | None:
        """a_{t-1} as float32 [N]."""
        if self.aggregate is not None and self.aggregate.dtype == torch.uint8:
            return ops.densify(self.aggregate, self.numel)
        return self.aggregate

    def momentum(self) -> Tensor:
        """The same, zero where there is none yet."""
        dense = self.dense_aggregate()
        return torch.zeros_like(self.memory) if dense is None else dense


def figures(
    buckets: Sequence[Bucket], steps: int, skipped: Tensor | None, size: int
) -> dict[str, Any]:
    """What ``GMC.stats`` returns; reads the device. size: world size p."""
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
    """How many times fewer bytes a link has carried than of a ring all-reduce of the gradient.

    A worker alone has no link and is taken for one of two.
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

    Backward produces gradients from the last layer to the first, so the buckets come in the order
    in which they fill. A parameter larger than the cap has a bucket of its own.

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
    # A numel that is no multiple of 8 would push all tensors behind it off their 16-byte loads.
    return sorted(params, key=lambda p: shard_of(p).numel() % 8 != 0)


def is_dense_layout(tensor: Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlap, in any order."""
    expected = 1
    for size, stride in sorted(
        zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]
    ):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def in_storage_order(tensor: Tensor) -> Tensor:
    """A tensor of dense layout as one-dimensional contiguous, sharing its storage."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class _Places:
    """Where the parameters of a bucket lie, for an operator.

    There are hundreds of them at every step, and handing over a tensor takes half a microsecond.

    Args:
        params: contiguous parameters.
    """

    _MAGIC = int.from_bytes(b"gcplaces", "little")  # csrc/ops.cpp
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
        """None where the operator must look at the tensors themselves.

        Args:
            look: whether they may have moved.
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
    """Whether all are contiguous tensors of a known dtype; None is not."""
    try:
        return DTYPES.issuperset(map(_dtype_of, grads)) and all(map(Tensor.is_contiguous, grads))
    except (AttributeError, TypeError, RuntimeError):  # None; some sparse layouts have no strides
        return False


def _flat_grad(param: Tensor, grad: Tensor) -> Tensor:
    param, grad = shard_of(param), shard_of_gradient(param, grad)
    if grad.is_contiguous() and param.is_contiguous():
        return grad
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return in_storage_order(grad)
