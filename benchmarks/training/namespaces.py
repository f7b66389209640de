"""Workers behind slow links on one machine: Linux network namespaces and token buckets.

Each worker has a namespace with one interface, `eth0`, and a cable to a bridge in a namespace of
its own. Both ends of each cable are limited, so a worker sends and receives at the rate at most.
Nothing is added outside these namespaces, and deleting them deletes it all. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.training import delaying_switch

ROOT = Path(__file__).resolve().parents[2]
PORT = 29500
RATES = {10_000: "10 Gbit/s", 1_000: "1 Gbit/s", 100: "100 Mbit/s", 10: "10 Mbit/s"}
# Burst and limit of tc's token bucket filter with which the rate was seen to be kept.
TOKEN_BUCKETS = {10_000: ("16mb", "32mb"), 1_000: ("256kb", "4mb"), 100: ("128kb", "1mb"),
                 10: ("32kb", "512kb")}  # fmt: skip
QDISC = ["tc", "qdisc", "replace", "dev"]


def missing() -> str | None:
    """What this machine lacks, None if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root: sudo make network"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` was not found: install iproute2"
    return None


def require() -> None:
    """Ends the program with one line if namespaces cannot be made; else lets SIGTERM end it as
    Ctrl-C does, so that they are deleted."""
    problem = missing()
    if problem:
        sys.exit(problem)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Star:
    """`with Star(4) as star:` has 4 namespaces; they are gone at its end, whatever ended it."""

    def __init__(self, workers: int) -> None:
        self.switch = f"gmc{os.getpid()}-switch"
        self.workers = [f"gmc{os.getpid()}-{rank}" for rank in range(workers)]
        self._delaying: subprocess.Popen | None = None

    def __enter__(self) -> Star:
        try:
            _run("ip", "netns", "add", self.switch)
            self._inside(self.switch, "ip", "link", "add", "bridge", "type", "bridge")
            self._inside(self.switch, "ip", "link", "set", "bridge", "up")
            for rank, name in enumerate(self.workers):
                _run("ip", "netns", "add", name)
                port = f"port{rank}"
                self._inside(self.switch, "ip", "link", "add", port, "type", "veth",
                             "peer", "name", "eth0", "netns", name)  # fmt: skip
                self._inside(self.switch, "ip", "link", "set", port, "master", "bridge", "up")
                address = f"{self.address(rank)}/24"
                self._inside(name, "ip", "address", "add", address, "dev", "eth0")
                for device in ("lo", "eth0"):
                    self._inside(name, "ip", "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._delaying is not None:
            self._delaying.kill()
            self._delaying.communicate()
        for name in [*self.workers, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def address(self, rank: int) -> str:
        return f"10.79.0.{rank + 1}"

    def limit(self, rate_mbit: int) -> None:
        """Sets the rate."""
        burst, limit = TOKEN_BUCKETS[rate_mbit]
        bucket = ["tbf", "rate", f"{rate_mbit}mbit", "burst", burst, "limit", limit]
        for rank, name in enumerate(self.workers):
            self._inside(name, *QDISC, "eth0", "root", *bucket)
            self._inside(self.switch, *QDISC, f"port{rank}", "root", *bucket)

    def delay(self, milliseconds: float) -> None:
        """From now on a packet takes so long from one worker to another. Once for a star."""
        ports = [f"port{rank}" for rank in range(len(self.workers))]
        for port in ports:
            self._inside(self.switch, "ip", "link", "set", port, "nomaster")
        self._delaying = subprocess.Popen(
            ["ip", "netns", "exec", self.switch, sys.executable, "-m", delaying_switch.__name__,
             str(milliseconds), *ports],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._delaying.stdout is not None  # a pipe
        if not self._delaying.stdout.readline():
            raise RuntimeError("the delaying switch did not start; see above")

    def run(self, module: str, *arguments: str) -> Iterator[dict]:
        """Runs a module as every worker, with torchrun's variables; yields what rank 0 prints,
        lines of JSON."""
        variables = {
            **os.environ,
            "MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT),
            "WORLD_SIZE": str(len(self.workers)), "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses here have no names, which is warned of
        }  # fmt: skip
        started: list[subprocess.Popen] = []
        try:
            for rank, name in enumerate(self.workers):
                started.append(subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-m", module, *arguments],
                    cwd=ROOT, env={**variables, "RANK": str(rank)}, text=True,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                ))  # fmt: skip
            assert started[0].stdout is not None  # a pipe
            for line in started[0].stdout:
                yield json.loads(line)
            codes = [worker.wait(60) for worker in started]
            if any(codes):
                raise RuntimeError(f"workers ended with exit statuses {codes}; see above")
        finally:
            for worker in started:
                worker.kill()
                worker.wait()

    def _inside(self, name: str, *command: str) -> None:
        _run("ip", "netns", "exec", name, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
