"""Sending during the backward pass: whose gradients have arrived, and in which order buckets go."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from gmc_cuda._engine.bucket import Bucket

# Who sends a parameter's gradient during the backward pass: the newest that listens to it. By the
# parameter's id: torch.utils.swap_tensors refuses tensors that have weak references.
_listeners: dict[int, weakref.ref[Overlap]] = {}


class Overlap:
    """Follows the gradients of a backward pass by hooks, which end with it.

    Args:
        on_gradient: a method, called for each parameter whose gradient has been accumulated. Its
            object is not kept alive.

    Attributes:
        following: whether a backward pass has begun that no step has ended yet.
    """

    def __init__(self, on_gradient: Callable[[Tensor], None]) -> None:
        self.following = False
        self._on_gradient = weakref.WeakMethod(on_gradient)
        self._handles: dict[Tensor, Any] = {}
        self._missing: dict[Bucket, set[Tensor]] = {}
        self._order: deque[Bucket] = deque()
        self._paused = False
        weakref.finalize(self, _remove, self._handles)

    def listen(self, params: Iterable[Tensor]) -> None:
        """Registers hooks on these parameters, and removes all others.

        Registers them anew where they were: torch.utils.swap_tensors leaves a parameter with a dict
        of hooks that the backward pass does not know any more, until it is set again.
        """
        _remove(self._handles)
        for param in params:
            before = _listeners.get(id(param), lambda: None)()
            if before is not None:
                before.release(param)
            _listeners[id(param)] = weakref.ref(self)
            hook = partial(_arrived, weakref.ref(self))
            self._handles[param] = param.register_post_accumulate_grad_hook(hook)
            param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks

    def release(self, param: Tensor) -> None:
        """Removes the hook on one parameter."""
        if param in self._handles:
            _remove({param: self._handles.pop(param)})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it gradients are accumulated only."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def hear(self, param: Tensor) -> None:
        on_gradient = self._on_gradient()
        if on_gradient is not None and not self._paused:
            on_gradient(param)

    def follow(self, buckets: Iterable[Bucket]) -> None:
        """A backward pass begins: no gradient of these has arrived."""
        self.following = True
        self._missing = {bucket: set(bucket.params) for bucket in buckets}
        self._order = deque(self._missing)

    def arrived(self, param: Tensor, bucket: Bucket) -> bool:
        """Notes a gradient. False if that bucket had all of its gradients before."""
        had_all = not self._missing[bucket]
        self._missing[bucket].discard(param)
        return not had_all

    def complete(self) -> Iterator[Bucket]:
        """The buckets that can go now.

        In bucket order, whatever order gradients arrive in, so that ranks cannot deadlock.
        """
        while self._order and not self._missing[self._order[0]]:
            yield self._order.popleft()


def _arrived(listener: weakref.ref[Overlap], param: Tensor) -> None:
    overlap = listener()
    if overlap is not None:
        overlap.hear(param)


def _remove(handles: dict[Tensor, Any]) -> None:
    for param, handle in handles.items():
        handle.remove()
        _listeners.pop(id(param), None)
    handles.clear()
