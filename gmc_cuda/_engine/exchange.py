"""The collectives of a process group, and the group of the other shards."""

from __future__ import annotations

import atexit
import os
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmc_cuda._engine.shards import Parts, groups_of


class GroupLost(RuntimeError):
    """A collective failed: another rank ended, or the time-out of the group passed."""

    def with_context(self, when: str, rank: int, outcome: str) -> GroupLost:
        """The error for users: when it happened, on which rank, and what became of the state."""
        return GroupLost(
            f"{when}, rank {rank} lost the group: {outcome}, state_dict() is usable; start again "
            f"with a new process group ({self})"
        )


class Work:
    """A collective that has ended, as all collectives of a single worker have.

    Attributes:
        arrived: whether wait() has returned without an error.
    """

    arrived = True

    def wait(self) -> None:
        """Waits for the end; raises GroupLost if the collective failed or could not be issued."""


class _Pending(Work):
    """A collective that has been issued.

    Errors are raised in wait() only, so that all buckets of a step add their gradients to memory
    before any error ends the step.
    """

    def __init__(
        self, collective: Callable[..., Any], *arguments: Any, group: Any, **options: Any
    ) -> None:
        self._error: RuntimeError | None = None
        self.arrived = False
        if arguments[0].is_cpu:
            _let_threads_finish_at_exit()
        try:
            self._work = collective(*arguments, **options, group=group, async_op=True)
        except RuntimeError as error:
            self._error = error

    def wait(self) -> None:
        try:
            if self._error is not None:
                raise self._error
            self._work.wait()
        except RuntimeError as error:
            raise GroupLost(str(error)) from error
        self.arrived = True


def _all_gather(gathered: Tensor, payload: Tensor, **options: Any) -> Any:
    # torch 2.15 renamed all_gather_into_tensor and warns about the old name.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return collective(gathered, payload, **options)


@cache
def _let_threads_finish_at_exit() -> None:
    """Delays the end of the interpreter by 0.1 s.

    A thread of gloo frees a collective's tensors after wait() has returned, and needs the
    interpreter for it. If the interpreter has ended by then, the thread aborts the process.
    """
    atexit.register(time.sleep, 0.1)


class Exchange:
    """The workers that exchange payloads: those of a process group, or this one alone.

    Attributes:
        given: the process group that the user passed; None for the default.
        group: the process group that is used; None for a single worker.
        shard_group: the workers that hold the other shards; None if parameters are not sharded.
        of_parts: whether plain tensors are parts of parameters, as NodeAverage makes them.
        size, rank: the world size p, and this worker's rank.
    """

    def __init__(self, process_group: Any) -> None:
        """Args: process_group: a group, None, or a device mesh, see shards.groups_of."""
        self.given, self.shard_group = groups_of(process_group)
        self.of_parts = isinstance(process_group, Parts)
        self._missing = False  # whether this copy came from a process with another group
        self._find()

    def _find(self) -> None:
        self.group, self.size, self.rank = self.given, 1, 0
        if self.group is None and dist.is_available() and dist.is_initialized():
            self.group = dist.group.WORLD
        if self.group is not None:
            self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
            if self.rank < 0:
                raise ValueError("process_group: got a group that this process is not part of")
        elif int(os.environ.get("WORLD_SIZE") or 1) > 1:
            warnings.warn(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not "
                "initialised, so this optimizer trains its worker alone: call "
                "torch.distributed.init_process_group() before you construct it",
                stacklevel=2,
            )

    def check(self) -> None:
        """Raises RuntimeError if this exchange no longer fits the process's groups."""
        if self._missing:
            raise RuntimeError(
                "this copy of an optimizer was made in another process and its process_group "
                "stayed there: set optimizer.process_group = group"
            )
        late = self.group is None and dist.is_available() and dist.is_initialized()
        if late and dist.get_world_size() > 1:
            raise RuntimeError(
                "torch.distributed was initialised after this optimizer was constructed, so it "
                "would train its worker alone: call init_process_group() first, then construct "
                "the optimizer"
            )

    def all_gather(self, payload: Tensor) -> tuple[Tensor, Work]:
        """Gathers every rank's uint8 [n] into uint8 [p, n], complete once the work has ended."""
        if self.size == 1:
            return payload.unsqueeze(0), Work()
        gathered = payload.new_empty(self.size * payload.numel())
        work = _Pending(_all_gather, gathered, payload, group=self.group)
        return gathered.view(self.size, -1), work

    def all_to_all(self, payloads: Tensor, sizes: list[int], nbytes: int) -> tuple[Tensor, Work]:
        """Sends one payload to each rank.

        Args:
            payloads: in rank order, one after the other, uint8.
            sizes: each one's bytes.
            nbytes: the size of each payload that this rank receives.

        Returns:
            The received payloads, uint8 [p, nbytes], complete once the work has ended; the work.
        """
        received = payloads.new_empty(self.size * nbytes)
        work = _Pending(
            dist.all_to_all_single, received, payloads, group=self.group,
            output_split_sizes=[nbytes] * self.size, input_split_sizes=sizes,
        )  # fmt: skip
        return received.view(self.size, nbytes), work

    def all_reduce(self, tensor: Tensor) -> Work:
        """Sums a tensor over all ranks in place. All ranks get the same bits."""
        if self.size == 1:
            return Work()
        return _Pending(dist.all_reduce, tensor, group=self.group)

    @property
    def alone(self) -> bool:
        """Whether no other worker, with this shard or another, takes part in a step."""
        return self.size == 1 and self.shard_group is None

    def strictest(self, verdict: Tensor) -> Tensor:
        """The largest of the verdicts (int32 [1]) of all shards."""
        if self.shard_group is not None:
            _Pending(dist.all_reduce, verdict, dist.ReduceOp.MAX, group=self.shard_group).wait()
        return verdict

    def sum_over_shards(self, number: Tensor) -> Tensor:
        """The sum of a scalar tensor over all shards."""
        if self.shard_group is not None:
            _Pending(dist.all_reduce, number, group=self.shard_group).wait()
        return number

    def name(self, rank: int) -> int:
        """A worker's rank among all of the run, for errors, by its rank in the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrites contiguous tensors with rank 0's."""
        if self.size == 1 or self.group is None:
            return
        source = dist.get_global_rank(self.group, 0)
        works = [dist.broadcast(t, source, group=self.group, async_op=True) for t in tensors]
        for work in works:
            if work is not None:
                work.wait()

    def gather_objects(self, value: Any, device: torch.device) -> list[Any]:
        """Every rank's small picklable object, in rank order. ``device`` is the parameters'."""
        if self.size == 1:
            return [value]
        # torch.compile, in a compiled step, cannot trace this collective.
        return list(torch.compiler.disable(self._gather_objects)(value, device))

    def _gather_objects(self, value: Any, device: torch.device) -> list[Any]:
        values: list[Any] = [None] * self.size
        # NCCL sends objects through the current device, which may belong to another rank.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            try:
                dist.all_gather_object(values, value, group=self.group)
            except RuntimeError as error:
                raise GroupLost(str(error)) from error
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        copy = object.__new__(Exchange)
        copy.__setstate__(self.__dict__)  # with the groups, which a pickled copy cannot have
        return copy

    def __getstate__(self) -> dict[str, Any]:
        # A copy needs rank and world size, which say what it owns, until it gets a group.
        return {
            "given": None, "group": None, "shard_group": None, "rank": self.rank, "size": self.size,
            "of_parts": self.of_parts, "_missing": self.given is not None or self._missing,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._missing:
            self._find()
