"""The range of a bucket that a worker owns in two-sided compression, with its owner memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine.ranges import Range


class Owner:
    """What this worker keeps of the range that it owns, for all workers.

    The other workers send it their part of the range. It adds their mean to the owner memory r, and
    sends the largest entries of that on to all.

    Attributes:
        range: the elements of the bucket that it owns.
        memory: r, float32, one for each of them.
        rank, size: this worker's rank and the world size p that the range was cut for.
    """

    def __init__(self, of: Range, rank: int, size: int, device: torch.device) -> None:
        self.range, self.rank, self.size = of, rank, size
        self.memory = torch.zeros(of.numel, dtype=torch.float32, device=device)
        self._aggregate: Tensor | None = None  # a_{t-1} within the range
        self._whole: Tensor | None = None  # the bucket's, which that is a part of

    def part(self, flat: Tensor) -> Tensor:
        """A flat tensor's elements in the range."""
        return flat[self.range.begin : self.range.end]

    def spread(self, like: Tensor) -> Tensor:
        """r as a tensor of the bucket's size, zero outside the range."""
        whole = torch.zeros_like(like)
        self.part(whole).copy_(self.memory)
        return whole

    def take_over(self, whole: Tensor, memory: Tensor) -> None:
        """Makes a tensor of the bucket's size r.

        Args:
            whole: what is outside the range in it is moved to ``memory``, and it becomes zero.
            memory: this worker's, which counts 1/p in the mean of all memories.
        """
        self.memory.copy_(self.part(whole))
        self.part(whole).zero_()
        if bool(whole.any()):
            memory.add_(whole, alpha=self.size)

    def fold_into(self, memory: Tensor) -> None:
        """Moves r into this worker's own memory, which counts 1/p in the mean of all memories."""
        if self.memory.numel():
            self.part(memory).add_(self.memory, alpha=self.size)
            self.memory.zero_()

    def aggregate_of(self, whole: Tensor | None, numel: int) -> Tensor | None:
        """a_{t-1} within the range, as ops.compress_ takes it.

        Args:
            whole: the bucket's: opaque uint8, or float32 [numel], or None.
        """
        if whole is None or not self.memory.numel():
            return None
        if whole is not self._whole:
            dense = whole if whole.dtype == torch.float32 else ops.densify(whole, numel)
            self.keep(ops.sparsify(self.part(dense).contiguous()), whole)
        return self._aggregate

    def keep(self, aggregate: Tensor, whole: Tensor | None) -> None:
        """Makes this what :meth:`aggregate_of` answers for the bucket's aggregate ``whole``."""
        if aggregate.is_cuda and torch.cuda.is_current_stream_capturing():
            assert self._aggregate is not None and whole is self._whole
            self._aggregate.copy_(aggregate)  # where a replay will look for it
        else:
            self._aggregate, self._whole = aggregate, whole
