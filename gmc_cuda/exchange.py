"""The collectives of a step, on the process group that the optimizer was given."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.15 renamed all_gather_into_tensor and warns about the old name; 2.11 has only that one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Done:
    """A collective with nothing left to wait for."""

    def wait(self) -> None:
        pass


class Exchange:
    """A process group, or a single worker where torch.distributed was not initialised.

    Attributes:
        size: world size p of the group.
        rank: this process's rank in it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is not None or (dist.is_available() and dist.is_initialized()):
            self.group = process_group if process_group is not None else dist.group.WORLD
            self.size = dist.get_world_size(self.group)
            self.rank = dist.get_rank(self.group)
            if self.rank < 0:
                raise ValueError("process_group: got a group that this process is not part of")
        else:
            self.group, self.size, self.rank = None, 1, 0

    def all_gather(self, payload: Tensor) -> tuple[Tensor, Any]:
        """Starts gathering uint8 [n] from every rank; returns uint8 [p, n] and a waitable."""
        if self.size == 1:
            return payload.unsqueeze(0), Done()
        gathered = payload.new_empty(self.size * payload.numel())
        work = _all_gather(gathered, payload, group=self.group, async_op=True)
        return gathered.view(self.size, -1), work

    def all_reduce(self, tensor: Tensor) -> Any:
        """Starts summing a tensor over all ranks in place; returns a waitable."""
        if self.size == 1:
            return Done()
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrites contiguous tensors with rank 0's."""
        if self.size == 1:
            return
        source = dist.get_global_rank(self.group, 0)
        works = [dist.broadcast(t, source, group=self.group, async_op=True) for t in tensors]
        for work in works:
            work.wait()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small picklable object, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sends_dense(self, numel: int, k: int, nbytes: int) -> bool:
        """Whether a bucket goes by dense all-reduce.

        A rank of a ring all-reduce receives 2 (p-1)/p * 4 N bytes, of an all-gather (p-1) *
        ``nbytes``. A single worker sends nothing, so only k = N is dense there.
        """
        return k == numel or (self.size > 1 and self.size * nbytes >= 8 * numel)
