"""Starts the workers, watches them, and ends them all when one dies or Ctrl-C arrives.

The workers are plain processes of the same script with torchrun's variables in the environment, so
that there is one kind of worker, whoever starts it. They meet in a file, which needs no port.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.demo import NAME

FOLDER = "GMC_DEMO_FOLDER"  # where a supervised worker finds the store and writes why it failed
POLL_SECONDS = 0.1
GRACE_SECONDS = 0.5  # after a first death: the culprit may be the one that is seen second
KILL_SECONDS = 2.0


def run(count: int, command: list[str]) -> int:
    """Run `count` workers to their end; returns the exit status. Prints at most one message."""
    missing = [n for n in ("torch", "gmc_cuda") if importlib.util.find_spec(n) is None]
    if missing:
        return _say(
            f"{' and '.join(missing)} not found by {sys.executable}: run `make demo`, or "
            "`pip install --no-build-isolation .` in the repository",
            1,
        )
    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped_by.append(received))
    with tempfile.TemporaryDirectory(prefix="gmc-demo-") as folder:
        workers = []
        try:
            workers += (_start(rank, count, command, folder) for rank in range(count))
            while not stopped_by:
                codes = [worker.poll() for worker in workers]
                if any(codes):
                    time.sleep(GRACE_SECONDS)
                    cause = find_cause(workers, folder)
                    break
                if None not in codes:
                    return 0
                time.sleep(POLL_SECONDS)
        finally:
            _end(workers)
    if stopped_by:
        name = signal.Signals(stopped_by[0]).name
        name = "Ctrl-C" if name == "SIGINT" else name
        return _say(f"stopped by {name}; all workers have ended", 128 + stopped_by[0])
    return _say(cause, 1)


def _start(rank: int, count: int, command: list[str], folder: str) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        FOLDER: folder,
    }
    # Ctrl-C reaches the whole foreground group. Workers inherit that it is ignored, from their
    # first instruction on; the supervisor alone decides.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with open(os.path.join(folder, f"stderr-{rank}"), "wb") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdin=subprocess.PIPE,  # closes when this process dies, and the worker with it
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else log,
            )
    finally:
        signal.signal(signal.SIGINT, handler)


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdin.close()


def find_cause(workers: list[subprocess.Popen], folder: str) -> str:
    """One message for the worker that failed first, as far as can be told.

    A worker that only lost its connection is a victim; a signal or any other error comes first.
    """
    found = []
    for rank, worker in enumerate(workers):
        if not worker.returncode and not worker.poll():
            continue
        if worker.returncode < 0:
            name = signal.Signals(-worker.returncode).name
            found.append((0, rank, f"worker {rank} (process {worker.pid}) was ended by {name}"))
            continue
        record = Path(folder, f"error-{rank}.json")
        if record.exists():
            error = json.loads(record.read_text())
            text = f"worker {rank} failed: {error['message']}"
            if error["traceback"] and not error["lost_connection"]:
                text = error["traceback"] + text
            found.append((2 if error["lost_connection"] else 1, rank, text))
        else:
            log = Path(folder, f"stderr-{rank}").read_text(errors="replace").strip()
            last = log.splitlines()[-1] if log else f"exit status {worker.returncode}"
            found.append((1, rank, f"worker {rank} failed: {last}"))
    return f"{min(found)[2]}; the other workers were stopped"


def _say(message: str, status: int) -> int:
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar may have left the cursor mid-line
    print(f"{start}{NAME}: {message}", file=sys.stderr)
    return status
