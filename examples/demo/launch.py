"""Starts the workers of one machine with torchrun, and says in one line why they ended early."""

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from examples.demo import NAME, device


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs this demo in options.workers processes until all have ended; returns the exit status."""
    workers = options.workers
    try:
        device.check(options.device, workers)
        Path(options.output).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return _say(str(error), 1)
    # A worker has its share of the cores. The workers meet on the loopback interface, which no
    # firewall and no name service stands in front of.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.disable(logging.CRITICAL)  # torchrun's own account of an early end has 30 lines
    with tempfile.TemporaryDirectory(prefix="gmc-demo-") as logs:
        try:
            torchrun.main([
                "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={workers}",
                "--local-ranks-filter=0", f"--log-dir={logs}", "-m", "examples.demo", *arguments,
            ])  # fmt: skip
        except SignalException as stopped:
            name = "Ctrl-C" if stopped.sigval == signal.SIGINT else stopped.sigval.name
            return _say(f"stopped by {name}; all workers have ended", 128 + stopped.sigval)
        except ChildFailedError as failed:
            return _say(f"{cause(failed.failures)}; the other workers were stopped", 1)
    return 0


def cause(failures: dict[int, ProcessFailure]) -> str:
    """What happened to the worker that failed first, as far as can be told.

    A worker that lost its connection, or that torchrun ended with SIGTERM, is a victim of another,
    and is named where nothing else is known.
    """
    found = []
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            said = f"worker {rank} (process {failure.pid}) was ended by {name}"
            found.append((2 if name == "SIGTERM" else 0, rank, said))
            continue
        error = failure.error_file_data.get("message", {})
        if not isinstance(error, dict):
            error = {}
        told = error.get("message", f"exit status {failure.exitcode}")
        lost = re.search(r"connection (closed|reset)|broken pipe", told, re.IGNORECASE)
        trace = error.get("extraInfo", {}).get("py_callstack", "")
        found.append((3 if lost else 1, rank, f"{trace}worker {rank} failed: {told}"))
    return min(found)[2]


def _say(message: str, status: int) -> int:
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar may have left the cursor mid-line
    *before, last = message.splitlines()
    print(*before, f"{start}{NAME}: {last}", sep="\n", file=sys.stderr)
    return status
