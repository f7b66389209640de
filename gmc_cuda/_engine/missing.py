"""Parameters without a gradient, which a step leaves alone, as torch.optim.SGD does.

In a sparse bucket each worker decides for itself: it adds nothing to such a parameter's memory. In
a dense bucket the workers count gradients: a parameter is left alone, together with its momentum,
only if no worker has a gradient for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine.bucket import Bucket

Arguments = dict[str, Any]


def absent_in(grads: Sequence[Tensor | None]) -> list[int]:
    """The indices of the parameters that have no gradient."""
    if all(map(is_not, grads, repeat(None))):  # the usual case, ten times as fast as the loop
        return []
    return [i for i, grad in enumerate(grads) if grad is None]


def needed_params(bucket: Bucket, absent: list[int], arguments: Arguments) -> list[Tensor] | None:
    """The ``params`` argument of an operator: None where it would not read them."""
    if absent:
        return bucket.flat_params()
    return bucket.param_places() if arguments["weight_decay"] != 0 else None


@contextmanager
def left_alone(
    bucket: Bucket, grads: Sequence[Tensor | None], arguments: Arguments, owned: bool = False
) -> Iterator[tuple[Arguments, list[Tensor] | None, Tensor | None]]:
    """A context in which ops.compress_ adds nothing for parameters without a gradient.

    Args:
        owned: whether the bucket's ranges have owners, who add the global momentum.

    Yields:
        arguments for ops.compress_: those of the rule, ``params`` and ``aggregate``.
    """
    absent = absent_in(grads)
    params = needed_params(bucket, absent, arguments)
    momentum = bucket.momentum_buffer is None and not owned
    if not absent or params is None:
        yield arguments, params, bucket.sparse_aggregate() if momentum else None
        return
    for i in absent:  # so that weight decay adds zero
        params[i] = torch.zeros_like(params[i])
    decay = arguments["memory_decay"]
    if decay != 1:  # which must not decay the memory of absent ones: it is done here
        arguments = {**arguments, "memory_decay": 1.0}
        for view, grad in zip(bucket.memory.split(bucket.sizes), grads, strict=True):
            if grad is not None:
                view.mul_(decay)
    if bucket.momentum_buffer is None:
        yield arguments, params, _without(bucket, absent) if momentum else None
        return
    views = bucket.views(bucket.momentum_buffer)
    kept = [views[i].clone() for i in absent]
    for i in absent:
        views[i].zero_()
    try:
        yield arguments, params, None
    finally:
        for i, old in zip(absent, kept, strict=True):
            views[i].copy_(old)


def _without(bucket: Bucket, absent: list[int]) -> Tensor | None:
    """a_{t-1} for ops.compress_, without the entries of these parameters."""
    dense = bucket.dense_aggregate()
    if dense is None or len(absent) == len(bucket.params):
        return None
    dense = dense.clone()
    views = bucket.views(dense)
    for i in absent:
        views[i].zero_()
    return ops.sparsify(dense)


class LeftAloneByAll:
    """Saves, and puts back, the parameters of a dense bucket that no worker has a gradient for.

    Args:
        grads: from ``bucket.flat_grads()``.
    """

    def __init__(self, bucket: Bucket, grads: Sequence[Tensor | None]) -> None:
        self.absent = absent_in(grads)
        self._bucket = bucket
        # For each absent one, whether all workers lack its gradient: bool on the device.
        self._nowhere: list[Tensor] = []
        # Copies of their state, for those that turn out to have no gradient on any worker.
        self._had = {
            name: [bucket.views(flat)[i].clone() for i in self.absent]
            for name, flat in bucket.vectors().items()
            if self.absent
        }

    def announce(self, present: Tensor) -> None:
        """Writes 1 for each gradient that this worker has: float32 [parameters], to be summed."""
        present.fill_(1.0)
        for i in self.absent:
            present[i] = 0.0
        self._present = present

    def leave(self, v: Tensor) -> None:
        """Zeroes them in v. Call it once the sum over all ranks is complete."""
        self._nowhere = [self._present[i] == 0 for i in self.absent]
        self._write(v, None)

    def without(self, previous: Tensor | None) -> Tensor | None:
        """a_{t-1} for ops.apply_, without their entries."""
        if previous is None:
            return None
        if self.absent:
            previous = previous.clone()
            self._write(previous, None)
        return ops.sparsify(previous)

    def put_back(self, v: Tensor, previous: Tensor | None) -> None:
        """Puts their memory and momentum back.

        Args:
            v: the next step's a_{t-1}, with global momentum.
            previous: this step's a_{t-1}.
        """
        for name, flat in self._bucket.vectors().items():
            self._write(flat, self._had.get(name))
        if self.absent and previous is not None:
            views = self._bucket.views(previous)
            self._write(v, [views[i] for i in self.absent])

    def _write(self, flat: Tensor, old: list[Tensor] | None) -> None:
        """Overwrites flat with old (None: zero) for those that no worker has a gradient for."""
        views = self._bucket.views(flat) if self.absent else []
        for n, i in enumerate(self.absent):
            before = 0.0 if old is None else old[n]
            views[i].copy_(torch.where(self._nowhere[n], before, views[i]))
