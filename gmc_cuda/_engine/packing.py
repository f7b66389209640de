"""The buckets of an optimizer: a cache of its param_groups and state, which are the truth.

torch.optim lets users reorder, extend and replace param groups; freeze, convert and move
parameters; clear, replace and offload state. So before every step param_groups and state are
compared with what the buckets were made from, and the buckets are rebuilt if they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import Bucket, make_buckets
from gmc_cuda._engine.lazy_views import LazyView
from gmc_cuda._engine.rules import Group, Rule
from gmc_cuda._engine.shards import is_sharded, shard_of

State = dict[Any, Any]

_params_of, _requires_grad = itemgetter("params"), attrgetter("requires_grad")
_layout = attrgetter("dtype", "device", "shape")


class Packing:
    """Buckets over the parameters that require a gradient, filled from the optimizer's state.

    Args:
        groups, state: the optimizer's param_groups and state. Each parameter's memory and momentum
            in state become views of the buckets. Other entries, and those of frozen parameters,
            stay.
        rule: the method, which says what state a worker keeps.
        cap_numel: the most elements of a bucket.
        owner: this worker's rank and the world size, with two-sided compression; else None.

    Attributes:
        buckets: the buckets, in the order in which the backward pass fills them.
        bucket_of: the bucket of each parameter that requires a gradient.
        moved: whether parameters were found in another storage since this was last set to False.
    """

    def __init__(
        self,
        groups: list[Group],
        state: State,
        rule: Rule,
        cap_numel: int,
        owner: tuple[int, int] | None,
    ) -> None:
        self._rule, self.moved = rule, False
        held = states.held(groups, state, rule)
        self.buckets: list[Bucket] = []
        for group in groups:
            params = [p for p in group["params"] if p.requires_grad]
            self.buckets += make_buckets(params, group, cap_numel, rule.local_momentum, owner)
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.params}
        states.install(self.buckets, rule, held)
        self._changed = [False]  # see Entry
        states.show(self.buckets, rule, state, self._changed)
        # A frozen parameter's state must not be a view that keeps an old bucket alive.
        for param in held.keys() - self.bucket_of.keys():
            state[param].update({name: t.clone() for name, t in held[param].items()})
        self._remember(groups, state)

    def _remember(self, groups: list[Group], state: State) -> None:
        self._groups = list(groups)
        self._lengths = _lengths(groups)
        self._params = list(chain.from_iterable(map(_params_of, groups)))
        self._requires_grad = list(map(_requires_grad, self._params))
        self._names = list(map(self._rule.momentum_name, groups))
        self._packed = list(self.bucket_of)
        # A DTensor's storage is that of its shard.
        self._sharded = any(map(is_sharded, self._packed))
        self._pointers, self._layouts = self._places(), self._layouts_now()
        self._contiguous = self._all_contiguous()
        self._entries = list(state.values())
        self._shown = [
            (state[param], {k: v for k, v in state[param].items() if k in states.SHOWN})
            for param in self._packed
        ]
        # A user may replace the storage of any of them (tensor.data = ...).
        self._vectors = [tensor for _, shown in self._shown for tensor in shown.values()
                         if not isinstance(tensor, LazyView)]  # fmt: skip
        self._storage = _storage(self._vectors)
        self._changed[0] = False

    def holds(self, groups: list[Group], state: Mapping[Any, Any]) -> bool:
        """Whether groups and state are still what the buckets were made from."""
        params = list(chain.from_iterable(map(_params_of, groups)))
        if not (_same(groups, self._groups) and _same(params, self._params)):
            return False
        if _lengths(groups) != self._lengths:
            return False
        if list(map(_requires_grad, params)) != self._requires_grad:
            return False
        if self._names != [self._rule.momentum_name(group) for group in groups]:
            return False
        pointers = self._places()
        # Strides need no look if all parameters were contiguous and still are.
        if pointers != self._pointers or not (self._contiguous and self._all_contiguous()):
            if self._layouts_now() != self._layouts:
                return False
            self._pointers = pointers  # another storage, with the same layout
            self.moved = True
            for bucket in self.buckets:
                bucket.forget_places()
        return self._state_holds(state)

    def _state_holds(self, state: Mapping[Any, Any]) -> bool:
        if len(state) != len(self._entries) or not all(map(is_, state.values(), self._entries)):
            return False
        if _storage(self._vectors) != self._storage:
            return False
        if self._changed[0]:
            for entry, shown in self._shown:
                if any(entry.get(name) is not tensor for name, tensor in shown.items()):
                    return False
            self._changed[0] = False
        return True

    def _places(self) -> list[int] | None:
        """The packed parameters' addresses, which change when they are moved or converted."""
        return _storage(map(shard_of, self._packed) if self._sharded else self._packed)

    def _all_contiguous(self) -> bool:
        return not self._sharded and all(map(Tensor.is_contiguous, self._packed))

    def _layouts_now(self) -> list[Any]:
        params = list(map(shard_of, self._packed)) if self._sharded else self._packed
        return [(*_layout(p), p.stride() if p.layout is torch.strided else None) for p in params]


def _storage(tensors: Iterable[Tensor]) -> list[int] | None:
    """The addresses of these tensors; None if one has no storage."""
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return None


def _lengths(groups: list[Group]) -> list[int]:
    return list(map(len, map(_params_of, groups)))


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))
