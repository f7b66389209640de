"""Gloo workers: processes of their own that run a test's functions, one rank each.

``Workers`` starts new ones for one test, which may pause, kill and wait for them; ``WorkerPool``
keeps four for the whole run and hands them one function after the other.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 180  # seconds without a word from a worker, far more than any needs
SIZES = (1, 2, 4)  # what most tests are run with
POOL_SIZES = (1, 2, 3, 4, 8)  # numbers of ranks that the pool can run
TIMEOUT = 300  # seconds a function may take in the pool, far more than any needs
AFTER_A_FAILURE = 20  # seconds for the other ranks, once one has failed

# A server that has imported everything forks the workers, so that each starts in milliseconds.
# The first optimizer of a process imports torch._dynamo.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["gmc_cuda", "pytest", "torch._dynamo", "torch.testing"])


class Failure:
    """An exception that a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.type = type(error).__name__
        self.message = str(error)
        self.trace = traceback.format_exc()


class Workers:
    """Runs a module-level function in `size` processes, ended when the with-block ends.

    The function is called as ``function(say, *args)`` with the default process group initialised;
    ``say(value)`` sends something picklable here, and what it returns comes last.

    Args:
        folder: an empty folder, for the store that the workers meet in.
        seconds: time-out of the process group.
    """

    def __init__(
        self, size: int, folder: Path, function: Callable[..., Any], *args: Any, seconds: float = 30
    ) -> None:
        self.ranks = range(size)
        pipes = [context.Pipe(duplex=False) for _ in self.ranks]
        self._pipes = [ours for ours, _ in pipes]
        self._store = store = str(folder / "store")
        self._processes = [
            context.Process(target=_work, args=(rank, size, store, seconds, theirs, function, args))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the end of a worker is the end of its pipe

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def hear(self, rank: int, patience: float = PATIENCE) -> Any:
        """The next thing that a worker says. Raises EOFError if it ended without a word."""
        if not self._pipes[rank].poll(patience):
            raise AssertionError(f"rank {rank} says nothing")
        heard = pickle.loads(self._pipes[rank].recv_bytes())
        if isinstance(heard, Failure):
            raise AssertionError(f"rank {rank} failed:\n{heard.trace}")
        return heard

    def results(self, ranks: Iterable[int] | None = None) -> list[Any]:
        return [self.hear(rank) for rank in (self.ranks if ranks is None else ranks)]

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def where(self, rank: int) -> str:
        """The stacks of a worker that hangs."""
        self.send_signal(rank, signal.SIGUSR1)
        time.sleep(1.0)
        return _stacks(self._store, rank).read_text()

    def wait_until_stopped(self, rank: int) -> None:
        """Waits until a worker that sends itself SIGSTOP has done so."""
        stat = Path(f"/proc/{self._processes[rank].pid}/stat")
        deadline = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"rank {rank} did not stop"
            time.sleep(0.01)


class WorkerPool:
    """Starts workers once; each call runs a module-level function on the first p ranks.

    The function is called as ``function(process_group, *args)`` and its results come back in rank
    order. An exception on a rank comes back as that rank's result, as a ``Failure``. Up to four
    ranks are among the same four workers, whose default group has four; eight are others.
    """

    def __init__(self) -> None:
        self._worlds: dict[int, _World] = {}

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
        world = max(size, max(SIZES))
        if world not in self._worlds:
            self._worlds[world] = _World(world)
        pipes = self._worlds[world].pipes[:size]
        for pipe in pipes:
            pipe.send((size, function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while waiting := [pipe for rank, pipe in enumerate(pipes) if rank not in results]:
            ready = connection.wait(waiting, deadline - time.monotonic())
            if not ready:
                late = sorted(set(range(size)) - results.keys())
                told = [f"rank {late} of {size} hangs in {function.__name__}"]
                told += [f"rank {rank}: {x.trace}" for rank, x in results.items() if _failed(x)]
                told += [f"rank {rank}: {self._worlds[world].where(rank)}" for rank in late]
                self.stop()
                raise AssertionError("\n".join(told))
            for pipe in ready:
                rank = pipes.index(pipe)
                results[rank] = pipe.recv()
                if _failed(results[rank]):  # the others may wait for this one for ever
                    deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE)
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        for world in self._worlds.values():
            world.stop()
        self._worlds = {}


def _failed(result: Any) -> bool:
    return isinstance(result, Failure)


class _World:
    """Workers that run what comes through their pipes."""

    def __init__(self, size: int) -> None:
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes: list[Any] = [ours for ours, _ in pipes]
        theirs = [other for _, other in pipes]
        self._folder = tempfile.TemporaryDirectory(prefix="gmc_cuda-pool-")
        self._workers = Workers(size, Path(self._folder.name), _serve, theirs, seconds=1800)
        for pipe in theirs:
            pipe.close()

    def where(self, rank: int) -> str:
        return self._workers.where(rank)

    def stop(self) -> None:
        self._workers.__exit__()
        self._folder.cleanup()


def _work(
    rank: int,
    size: int,
    store: str,
    seconds: float,
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The whole work of a process of Workers."""
    gc.freeze()  # what has been imported is no garbage, and no DDP: an optimizer looks for those
    faulthandler.register(signal.SIGUSR1, _stacks(store, rank).open("w"))
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def say(value: Any) -> None:
        # Not pipe.send(), which would hand on the tensors of a worker that may be gone by then.
        pipe.send_bytes(pickle.dumps(value))

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )
        say(function(say, *args))
    except Exception as error:
        say(Failure(error))
    os._exit(0)  # the interpreter's shutdown may wait for peers that are gone


def _stacks(store: str, rank: int) -> Path:
    """Where a worker writes its stacks when it is asked for them."""
    return Path(f"{store}.{rank}.stacks")


def _serve(say: Callable[[Any], None], pipes: list[Any]) -> None:
    """What a worker of the pool does until the pool is gone."""
    pipe = pipes[dist.get_rank()]
    possible = [size for size in POOL_SIZES if size <= dist.get_world_size()]
    groups = {size: dist.new_group(range(size)) for size in possible}
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
