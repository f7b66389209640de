"""Sending during the backward pass: which gradients have arrived, and which bucket goes next."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine.bucket import Bucket

# The Overlap that sends a parameter's gradient, the newest if there are several. The key is the
# parameter's id, because torch.utils.swap_tensors refuses tensors that have weak references.
_listeners: dict[int, weakref.ref[Overlap]] = {}


class Overlap:
    """Follows the gradients of backward passes by hooks, which are removed with this object.

    Args:
        on_gradient: a method, called with each parameter whose gradient has been accumulated. Its
            object is not kept alive.

    Attributes:
        following: whether a backward pass has begun that no step has ended yet.
    """

    def __init__(self, on_gradient: Callable[[Tensor], None]) -> None:
        self.following = False
        self._on_gradient = weakref.WeakMethod(on_gradient)
        self._handles: dict[Tensor, Any] = {}
        self._missing: dict[Bucket, set[Tensor]] = {}
        self._streams: dict[Bucket, set[torch.cuda.Stream]] = {}  # that its gradients are made on
        self._order: deque[Bucket] = deque()
        self._paused = False
        weakref.finalize(self, _remove, self._handles)

    def listen(self, params: Iterable[Tensor]) -> None:
        """Registers hooks on these parameters, and removes all others.

        Existing hooks are registered again too: after torch.utils.swap_tensors the backward pass
        ignores a parameter's dict of hooks until the attribute is set again.
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
        """A context in which gradients are accumulated but not sent."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def pass_on(self, param: Tensor) -> None:
        """Calls on_gradient, unless this is paused outside of a backward pass that is followed."""
        on_gradient = self._on_gradient()
        if on_gradient is not None and (self.following or not self._paused):
            on_gradient(param)

    def follow(self, buckets: Iterable[Bucket]) -> None:
        """Begins a backward pass, in which no gradient of these buckets has arrived yet."""
        self.following = True
        self._missing = {bucket: set(bucket.params) for bucket in buckets}
        self._streams = {bucket: set() for bucket in self._missing}
        self._order = deque(self._missing)

    def arrived(self, param: Tensor, bucket: Bucket) -> bool:
        """Notes a gradient, unless this is paused.

        Returns:
            False if it comes too late: the bucket already had all of its gradients, or, if this is
            paused, was sent.
        """
        if self._paused:
            return bucket in self._order
        had_all = not self._missing[bucket]
        self._missing[bucket].discard(param)
        if param.is_cuda:
            self._streams[bucket].add(torch.cuda.current_stream(param.device))
        return not had_all

    def complete(self) -> Iterator[Bucket]:
        """Yields the buckets to send now.

        They come in bucket order on all ranks, whatever order gradients arrive in: ranks that issue
        collectives in different orders would deadlock. The present stream waits for all gradients
        of a bucket, because layers may run on several streams, and backward passes as they do.
        """
        while self._order and not self._missing[self._order[0]]:
            bucket = self._order.popleft()
            for stream in self._streams[bucket]:
                present = torch.cuda.current_stream(stream.device)
                if stream != present:
                    present.wait_stream(stream)
                    _keep_for(present, bucket)
            yield bucket


def _keep_for(stream: torch.cuda.Stream, bucket: Bucket) -> None:
    """Keeps the allocator from reusing a bucket's gradients before this stream has read them."""
    for param in bucket.params:
        if param.grad is not None and param.grad.layout == torch.strided:
            param.grad.record_stream(stream)


def _arrived(listener: weakref.ref[Overlap], param: Tensor) -> None:
    overlap = listener()
    if overlap is not None:
        overlap.pass_on(param)


def _remove(handles: dict[Tensor, Any]) -> None:
    for param, handle in handles.items():
        handle.remove()
        _listeners.pop(id(param), None)
    handles.clear()
