"""Gloo workers in processes of their own, which a test may pause, kill and wait for."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60  # seconds without a word from a worker, far more than any needs

# A server that has imported everything forks the workers, so that each starts in milliseconds.
# The first optimizer of a process imports torch._dynamo.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["gmc_cuda", "pytest", "torch._dynamo", "torch.testing"])


class Processes:
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
        store = str(folder / "store")
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, store, seconds, theirs, function, args)
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the end of a worker is the end of its pipe

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def hear(self, rank: int, patience: float = PATIENCE) -> Any:
        """The next thing that a worker says. Raises EOFError if it ended without a word."""
        if not self._pipes[rank].poll(patience):
            raise AssertionError(f"rank {rank} says nothing")
        heard = pickle.loads(self._pipes[rank].recv_bytes())
        if isinstance(heard, _Failure):
            raise AssertionError(f"rank {rank} failed:\n{heard.trace}")
        return heard

    def results(self, ranks: Iterable[int] | None = None) -> list[Any]:
        return [self.hear(rank) for rank in (self.ranks if ranks is None else ranks)]

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_until_stopped(self, rank: int) -> None:
        """Waits until a worker that sends itself SIGSTOP has done so."""
        stat = Path(f"/proc/{self._processes[rank].pid}/stat")
        deadline = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"rank {rank} did not stop"
            time.sleep(0.01)


class _Failure:
    def __init__(self) -> None:
        self.trace = traceback.format_exc()


def _serve(
    rank: int,
    size: int,
    store: str,
    seconds: float,
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
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
    except Exception:
        say(_Failure())
    os._exit(0)  # the interpreter's shutdown may wait for peers that are gone
