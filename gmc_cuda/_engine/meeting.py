"""Ways for workers to come together that are not a step: to meet, and to settle something.

A collective that one worker alone calls pairs with whatever the others call next, and gloo ends a
process where the sizes differ. So workers meet before they call any, in a way that pairs with
nothing, and that ends in an error on a worker which is alone.
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

Said = dict[str, Any]  # what json can write; "error" says what went wrong

_LATER = 2.0  # seconds that workers wait longer than the one that answers them


def meet(exchange: Exchange, what: str) -> None:
    """Returns once all workers have come here.

    Args:
        what: the call that all of them must make, for the error.

    Raises:
        GroupLost: one did not come within the time-out of the group, or is gone.
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
    except ValueError as error:  # torch knows the group no more
        raise RuntimeError(
            f"{what}: the process group of this optimizer was destroyed. Make a new one with "
            "torch.distributed.init_process_group(), and write\n"
            "    optimizer.process_group = torch.distributed.group.WORLD"
        ) from error
    except RuntimeError as error:
        raise GroupLost(f"all workers must call {what}, and not all did: {error}") from error


def _meet_at_the_store(group: Any, exchange: Exchange, what: str) -> None:
    """The same for backends without a barrier that fails on one worker alone."""
    find_store = getattr(group, "get_group_store", None)
    if find_store is None:  # an older torch
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
    """How many seconds the collectives of a group may take."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout.total_seconds()
        except (AttributeError, RuntimeError):  # it has none for this device
            pass
    return dist.default_pg_timeout.total_seconds()


class Council(Protocol):
    """Workers that settle something together."""

    def settle(self, said: Said, decide: Callable[[list[Said]], Said]) -> Said:
        """What rank 0 decides on what all said, on every worker. decide must not raise."""


class Collective:
    """They do by collectives, while nothing else uses the group."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device

    def settle(self, said: Said, decide: Callable[[list[Said]], Said]) -> Said:
        everyone = self._exchange.gather_objects(said, self._device)
        answer = decide(everyone) if self._exchange.rank == 0 else None
        settled: Said = self._exchange.gather_objects(answer, self._device)[0]
        return settled


class Notes:
    """They do by files in a folder that all see.

    This needs no process group, so it goes on beside the training, whatever order that calls its
    collectives in, and after the group was destroyed.

    Args:
        folder: is there or is made, and is empty at first.
        rank, size: of this worker.
        seconds: how long to wait for the others each time.
    """

    def __init__(self, folder: Path, rank: int, size: int, seconds: float) -> None:
        self._folder, self._rank, self._size, self._seconds = folder, rank, size, seconds
        self._round = 0
        folder.mkdir(exist_ok=True)
        self._sign(rank, "here").touch()

    def settle(self, said: Said, decide: Callable[[list[Said]], Said]) -> Said:
        self._round += 1
        self._write(f"{self._round}.{self._rank}", said)
        answer = f"{self._round}.answer"
        if self._rank == 0:
            deadline = time.monotonic() + self._seconds
            ranks = range(self._size)
            everyone = [self._read(f"{self._round}.{rank}", rank, deadline) for rank in ranks]
            settled = decide(everyone)
            self._write(answer, settled)
            return settled
        settled = self._read(answer, 0, time.monotonic() + self._seconds + _LATER)
        (self._folder / f"{self._round}.{self._rank}").unlink(missing_ok=True)
        return settled

    def _write(self, name: str, said: Said) -> None:
        new = self._folder / f"{name}.new"
        try:
            new.write_text(json.dumps(said))
            os.replace(new, self._folder / name)
        except OSError:
            # The disk is full, perhaps. Another name for a file that is there needs no room.
            # If it fails too, the others wait for the time-out.
            with suppress(OSError):
                os.replace(self._sign(self._rank, "here"), self._sign(self._rank, "failed"))

    def _read(self, name: str, rank: int, deadline: float) -> Said:
        pause = 0.002
        while True:
            try:
                said: Said = json.loads((self._folder / name).read_text())
                return said
            except FileNotFoundError:
                pass
            except OSError as error:
                return {"error": f"{type(error).__name__}: {error}"}
            if self._sign(rank, "failed").exists():
                return {"error": f"worker {rank} cannot write into {self._folder}"}
            if not self._folder.exists():
                return {"error": f"{self._folder} was removed meanwhile"}
            if time.monotonic() > deadline:
                told = f"worker {rank} gave no word within {self._seconds:g} s, the time-out"
                return {"error": f"{told} of the process group"}
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _sign(self, rank: int, what: str) -> Path:
        return self._folder / f"{what}.{rank}"
