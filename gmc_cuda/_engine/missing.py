"""Parameters without a gradient: a step leaves them alone, as torch.optim.SGD does.

Where payloads are gathered each worker decides by itself: it adds nothing to such a parameter's
memory. Where v is summed the workers count: only a parameter that none of them has a gradient for
is left alone, momentum and all.
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
    """Which parameters of a bucket have no gradient."""
    if all(map(is_not, grads, repeat(None))):  # ten times as fast, and nearly always so
        return []
    return [i for i, grad in enumerate(grads) if grad is None]


def needed_params(bucket: Bucket, absent: list[int], arguments: Arguments) -> list[Tensor] | None:
    """The parameters, where an operator looks at them."""
    if absent:
        return bucket.flat_params()
    return bucket.param_places() if arguments["weight_decay"] != 0 else None


@contextmanager
def left_alone(
    bucket: Bucket, grads: Sequence[Tensor | None], arguments: Arguments, by_range: bool = False
) -> Iterator[tuple[Arguments, list[Tensor] | None, Tensor | None]]:
    """Within it ops.compress_ adds nothing for the parameters without a gradient.

    Args:
        by_range: whether ranges of the bucket are compressed one by one. That takes the parameters
            as tensors, and leaves the global momentum to their owners.

    Yields:
        its arguments: those of the rule, params and aggregate.
    """
    absent = absent_in(grads)
    params = needed_params(bucket, absent, arguments)
    momentum = bucket.momentum_buffer is None and not by_range
    if not absent or params is None:
        params = bucket.flat_params() if by_range and params is not None else params
        yield arguments, params, bucket.sparse_aggregate() if momentum else None
        return
    for i in absent:  # weight decay of zeros
        params[i] = torch.zeros_like(params[i])
    decay = arguments["memory_decay"]
    if decay != 1:  # of the others' memory only
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
    """a_{t-1} as compress_ takes it, without the entries of some parameters."""
    dense = bucket.dense_aggregate()
    if dense is None or len(absent) == len(bucket.params):
        return None
    dense = dense.clone()
    views = bucket.views(dense)
    for i in absent:
        views[i].zero_()
    return ops.sparsify(dense)


class LeftAloneByAll:
    """The parameters of a dense bucket that have no gradient here, and perhaps nowhere.

    Args:
        grads: from ``bucket.flat_grads()``.
    """

    def __init__(self, bucket: Bucket, grads: Sequence[Tensor | None]) -> None:
        self.absent = absent_in(grads)
        self._bucket = bucket
        self._nowhere: list[Tensor] = []  # for each of them, bool on the device; no host sync
        # What they have, should it turn out that nobody has a gradient.
        self._had = {
            name: [bucket.views(flat)[i].clone() for i in self.absent]
            for name, flat in bucket.vectors().items()
            if self.absent
        }

    def announce(self, present: Tensor) -> None:
        """Writes which gradients are here: float32 [parameters], to be summed over all ranks."""
        present.fill_(1.0)
        for i in self.absent:
            present[i] = 0.0
        self._present = present

    def leave(self, v: Tensor) -> None:
        """Takes them out of the sum: call it once that is complete."""
        self._nowhere = [self._present[i] == 0 for i in self.absent]
        self._write(v, None)

    def without(self, previous: Tensor | None) -> Tensor | None:
        """a_{t-1} as ops.apply_ takes it, without them."""
        if previous is None:
            return None
        if self.absent:
            previous = previous.clone()
            self._write(previous, None)
        return ops.sparsify(previous)

    def put_back(self, v: Tensor, previous: Tensor | None) -> None:
        """Gives them their memory and momentum again.

        Args:
            v: the next step's a_{t-1}, where momentum is global.
            previous: this step's.
        """
        for name, flat in self._bucket.vectors().items():
            self._write(flat, self._had.get(name))
        if self.absent and previous is not None:
            views = self._bucket.views(previous)
            self._write(v, [views[i] for i in self.absent])

    def _write(self, flat: Tensor, old: list[Tensor] | None) -> None:
        """Where nobody has a gradient, flat becomes what it was (None: zero)."""
        views = self._bucket.views(flat) if self.absent else []
        for n, i in enumerate(self.absent):
            before = 0.0 if old is None else old[n]
            views[i].copy_(torch.where(self._nowhere[n], before, views[i]))
