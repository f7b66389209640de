"""How workers wait for each other, and decide something together, outside a step.

A collective that one worker alone calls pairs with whatever the others call next, and gloo ends a
process where the sizes differ. So the workers meet before they call any collective. The meeting
pairs with nothing else, and a worker that is alone in it gets an error.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gmc_cuda._engine.exchange import Exchange, GroupLost

Report = dict[str, Any]  # values that json can write; the key "error" says what went wrong

_LATER = 2.0  # seconds by which workers wait longer than rank 0, whose answer they wait for


def meet(exchange: Exchange, what: str) -> None:
    """Returns once all workers have come here.

    Args:
        what: the call that all of them must make, for the error.

    Raises:
        GroupLost: a worker did not come within the time-out of the group, or has ended.
        RuntimeError: the process group was destroyed.
    """
    group = exchange.group
    if exchange.size == 1 or group is None:
        return
    try:
        if dist.get_backend(group) == dist.Backend.GLOO:
            wait = timedelta(seconds=timeout_of(group))
            dist.monitored_barrier(group, timeout=wait, wait_all_ranks=True)
        else:
            _meet_at_the_store(group, exchange, what)
    except ValueError as error:  # torch no longer knows the group
        raise RuntimeError(
            f"{what}: the process group of this optimizer was destroyed. Make a new one with "
            "torch.distributed.init_process_group(), and write\n"
            "    optimizer.process_group = torch.distributed.group.WORLD"
        ) from error
    except RuntimeError as error:
        raise GroupLost(f"all workers must call {what}, and not all did: {error}") from error


def _meet_at_the_store(group: Any, exchange: Exchange, what: str) -> None:
    """Meets by counters in the group's store, for backends without a monitored barrier."""
    find_store = getattr(group, "get_group_store", None)
    if find_store is None:  # older versions of torch lack it
        return
    store, key = find_store(), f"gmc_cuda/{what}"
    number = store.add(f"{key}/{exchange.rank}", 1)
    deadline, pause = time.monotonic() + timeout_of(group), 0.001
    came = store.add(key, 1)
    while came < number * exchange.size:
        if time.monotonic() > deadline:
            store.add(f"{key}/{exchange.rank}", -1)
            store.add(key, -1)
            missing = [
                str(rank)
                for rank in range(exchange.size)
                if store.add(f"{key}/{rank}", 0) < number and rank != exchange.rank
            ]
            raise RuntimeError(f"rank {', '.join(missing)} did not come in time")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        came = store.add(key, 0)


def timeout_of(group: Any) -> float:
    """The time-out of a group's collectives, in seconds."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout.total_seconds()
        except (AttributeError, RuntimeError):  # the group has no backend for this device
            pass
    return dist.default_pg_timeout.total_seconds()


class Council(Protocol):
    """Workers that decide something together."""

    def decide(self, report: Report, answer_of: Callable[[list[Report]], Report]) -> Report:
        """Returns, on every worker, what rank 0 made of all workers' reports.

        Args:
            report: this worker's.
            answer_of: makes the answer of the reports in rank order; must not raise.
        """


class Collective:
    """A council by collectives, for while nothing else uses the group."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device

    def decide(self, report: Report, answer_of: Callable[[list[Report]], Report]) -> Report:
        everyone = self._exchange.gather_objects(report, self._device)
        answer = answer_of(everyone) if self._exchange.rank == 0 else None
        decided: Report = self._exchange.gather_objects(answer, self._device)[0]
        return decided


class Notes:
    """A council by files in a folder that all workers see.

    Files need no process group, so this council can meet in a thread beside the training, whose
    collectives come in any order, and after the group was destroyed.

    Args:
        folder: made if it does not exist; no other council may have used it.
        rank, size: this worker's rank, and the world size.
        seconds: how long each decision waits for the other workers.
    """

    def __init__(self, folder: Path, rank: int, size: int, seconds: float) -> None:
        self._folder, self._rank, self._size, self._seconds = folder, rank, size, seconds
        self._round = 0
        folder.mkdir(exist_ok=True)
        self._sign(rank, "here").touch()

    def decide(self, report: Report, answer_of: Callable[[list[Report]], Report]) -> Report:
        self._round += 1
        self._write(f"{self._round}.{self._rank}", report)
        file = f"{self._round}.answer"
        if self._rank == 0:
            deadline = time.monotonic() + self._seconds
            ranks = range(self._size)
            everyone = [self._read(f"{self._round}.{rank}", rank, deadline) for rank in ranks]
            answer = answer_of(everyone)
            self._write(file, answer)
            return answer
        answer = self._read(file, 0, time.monotonic() + self._seconds + _LATER)
        (self._folder / f"{self._round}.{self._rank}").unlink(missing_ok=True)
        return answer

    def _write(self, name: str, report: Report) -> None:
        new = self._folder / f"{name}.new"
        try:
            new.write_text(json.dumps(report))
            os.replace(new, self._folder / name)
        except OSError:
            # The disk may be full. To rename a file that exists needs no room, so this still tells
            # the other workers. If it fails too, they wait until the time-out.
            with suppress(OSError):
                os.replace(self._sign(self._rank, "here"), self._sign(self._rank, "failed"))

    def _read(self, name: str, rank: int, deadline: float) -> Report:
        pause = 0.002
        while True:
            try:
                report: Report = json.loads((self._folder / name).read_text())
                return report
            except FileNotFoundError:
                pass
            except OSError as error:
                return {"error": f"{type(error).__name__}: {error}"}
            if self._sign(rank, "failed").exists():
                return {"error": f"worker {rank} cannot write into {self._folder}"}
            if not self._folder.exists():
                return {"error": f"{self._folder} was removed during the save"}
            if time.monotonic() > deadline:
                waited = f"{self._seconds:g} s, the time-out of the process group"
                return {"error": f"worker {rank} did not answer within {waited}"}
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _sign(self, rank: int, what: str) -> Path:
        return self._folder / f"{what}.{rank}"
