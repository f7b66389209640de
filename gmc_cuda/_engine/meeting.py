"""How workers come together outside a step: to meet, and to decide something together.

A collective that one worker calls alone pairs with whatever the others call next, and gloo ends the
process if the two differ in size. So workers meet before such a collective, at the store of their
process group, which no collective uses: a worker that comes alone gets an error, and the other
workers are not disturbed.
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


def meet(exchange: Exchange, what: str, place: str = "") -> None:
    """Returns once all workers have come here.

    Args:
        what: the call that all of them must make, for the error.
        place: where they meet, if several calls share a place. Default: a place of this call.

    Raises:
        RuntimeError: a worker did not come within the time-out of the group, on each worker that
            did; or the exchange does not fit the groups of this process.
        GroupLost: the store cannot be reached.
    """
    exchange.check()
    group = exchange.group
    if exchange.size == 1 or group is None:
        return
    try:
        dist.get_backend(group)
    except ValueError as error:  # torch no longer knows the group
        raise RuntimeError(
            f"{what}: the process group of this optimizer was destroyed. Make a new one with "
            "torch.distributed.init_process_group(), and write\n"
            "    optimizer.process_group = torch.distributed.group.WORLD"
        ) from error
    seconds = timeout_of(group)
    try:
        missing = _Place(group.get_group_store(), place or what, exchange).missing(seconds)
    except RuntimeError as error:
        raise GroupLost(f"{what}: the store of the process group is lost: {error}") from error
    if missing:
        ranks = ", ".join(map(str, missing))
        raise RuntimeError(
            f"all workers must call {what}, but rank {ranks} did not within {seconds:g} s, the "
            "time-out of the process group. This call has changed nothing"
        )


class _Place:
    """Where workers meet, as entries in the store of their group.

    A place has gates with numbers, one for each meeting. The last worker to come to a gate opens
    it, and one that has waited long enough closes it. The store takes the first of these decisions
    only, so that all workers that have come obey the same one. A worker that finds a gate decided
    when it comes goes on to the next.
    """

    def __init__(self, store: Any, name: str, exchange: Exchange) -> None:
        self._store, self._name = store, f"gmc_cuda/{name}"
        self._rank, self._size = exchange.rank, exchange.size

    def missing(self, seconds: float) -> list[int]:
        """Waits for the other workers; returns the ranks of those that did not come in time."""
        number = self._store.add(f"{self._name}/number", 0)
        while True:
            gate = f"{self._name}/{number}"
            if not self._store.check([gate]):
                missing = self._decide(gate, self._wait(gate, seconds), number)
                if self._rank not in missing:  # else it was closed before this worker came
                    return missing
            number += 1

    def _wait(self, gate: str, seconds: float) -> list[int]:
        """Waits until the gate can be decided, or is; returns the ranks that are missing."""
        store, ranks = self._store, range(self._size)
        # After an interrupt a worker may come to the same gate again, which counts once.
        first = store.add(f"{gate}/{self._rank}", 1) == 1
        if store.add(f"{gate}/came", int(first)) == self._size:
            return []
        deadline, pause = time.monotonic() + seconds, 0.001
        while not store.check([gate]):
            if time.monotonic() > deadline:
                return [rank for rank in ranks if not store.check([f"{gate}/{rank}"])]
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return []

    def _decide(self, gate: str, missing: list[int], number: int) -> list[int]:
        """Opens the gate if nobody is missing, else closes it; an earlier decision stays."""
        store, before = self._store, f"{self._name}/{number - 1}"
        proposed = json.dumps({"by": self._rank, "missing": missing})
        decision = json.loads(store.compare_set(gate, "", proposed))
        store.delete_key(f"{before}/{self._rank}")
        if decision["by"] == self._rank:
            store.add(f"{self._name}/number", 1)
            if not decision["missing"]:  # all workers have left the gate before
                store.delete_key(f"{before}/came")
                store.delete_key(before)
        decided: list[int] = decision["missing"]
        return decided


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
