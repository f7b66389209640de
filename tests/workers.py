"""A pool of gloo processes that run test functions side by side, one rank each."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes import context

SIZES = (1, 2, 4)
TIMEOUT = 120  # seconds a test function may take, far more than any needs


class WorkerPool:
    """Starts the processes once; each call runs a module-level function on the first p ranks.

    The function is called as ``function(process_group, *args)`` and its results come back in rank
    order. An exception on a rank comes back as that rank's result, wrapped in ``Failure``.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs and raises if any rank failed."""
        results = self.try_run(size, function, *args)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                self.stop()  # the next test must not meet half-finished collectives
                raise AssertionError(f"rank {rank} of {size} failed:\n{result.trace}")
        return results

    def try_run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs and returns failures too; for functions that leave no collective half-done."""
        if not self._processes:
            self._start()
        for pipe in self._pipes[:size]:
            pipe.send((size, function, args))
        results = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(TIMEOUT):
                self.stop()
                raise AssertionError(f"rank {rank} of {size} hangs in {function.__name__}")
            results.append(pipe.recv())
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        pipes = [context.Pipe() for _ in range(max(SIZES))]
        store = tempfile.mktemp(prefix="gmc_cuda_store_")
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, theirs, store), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()


class Failure:
    """An exception that a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.type = type(error).__name__
        self.message = str(error)
        self.trace = traceback.format_exc()


def _serve(rank: int, pipe: Any, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(SIZES))
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    while True:
        try:
            size, function, args = pipe.recv()
        except EOFError:
            return
        try:
            result = function(groups[size], *args)
        except Exception as error:
            result = Failure(error)
        pipe.send(result)
