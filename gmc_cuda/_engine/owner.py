"""The range of a bucket that a worker owns in two-sided compression, with its owner memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine.device import is_capturing
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.ranges import Range


class Owner:
    """The owner memory r of the range that this worker owns.

    All workers send their entries of the range to its owner. The owner adds the mean of them to r,
    and sends the largest entries of r to all.

    Attributes:
        range: the range of the bucket.
        memory: r, float32 [elements of the range].
        rank, size: this worker's rank, and the world size p for which the range was cut.
    """

    def __init__(self, of: Range, rank: int, size: int, device: torch.device) -> None:
        self.range, self.rank, self.size = of, rank, size
        self.memory = torch.zeros(of.numel, dtype=torch.float32, device=device)
        self._aggregate: Tensor | None = None  # a_{t-1} within the range
        self._whole: Tensor | None = None  # the bucket's aggregate, of which it is a part

    def part(self, flat: Tensor) -> Tensor:
        """A flat tensor's elements in the range."""
        return flat[self.range.begin : self.range.end]

    def spread(self, like: Tensor) -> Tensor:
        """r as a tensor of the bucket's size, zero outside the range."""
        whole = torch.zeros_like(like)
        self.part(whole).copy_(self.memory)
        return whole

    def take_over(self, whole: Tensor, memory: Tensor) -> None:
        """Sets r from a tensor of the bucket's size, and moves what is outside the range to memory.

        Args:
            whole: the new r, float32 [N]; its elements in the range are zeroed.
            memory: this worker's memory, which counts 1/p in the mean of all memories.
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
        """a_{t-1} within the range, as an aggregate for ops.compress_.

        Args:
            whole: the bucket's a_{t-1}: opaque uint8, or float32 [numel], or None.
        """
        if whole is None or not self.memory.numel():
            return None
        if whole is not self._whole:
            dense = whole if whole.dtype == torch.float32 else ops.densify(whole, numel)
            self.keep(ops.sparsify(self.part(dense).contiguous()), whole)
        return self._aggregate

    def keep(self, aggregate: Tensor, whole: Tensor | None) -> None:
        """Makes this what :meth:`aggregate_of` returns for the bucket's aggregate ``whole``."""
        if is_capturing(aggregate):
            assert self._aggregate is not None
            assert whole is self._whole
            self._aggregate.copy_(aggregate)  # a graph's replay reads it there
        else:
            self._aggregate, self._whole = aggregate, whole


def owner_of(way: str, exchange: Exchange) -> tuple[int, int] | None:
    """This worker's rank and the world size, if ranges of buckets have owners; else None.

    Args:
        way: "all_gather" or "reduce_scatter".
    """
    if way == "all_gather" or exchange.size == 1:
        return None
    return exchange.rank, exchange.size
