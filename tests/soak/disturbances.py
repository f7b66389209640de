"""What is done to a worker at a collective of its step: it dies, stops for a while, or gets damage.

Each is arranged before the step, and happens once.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from gmc_cuda._engine.exchange import Exchange

ALL = ("all_gather", "all_reduce", "all_to_all")
TOWARDS, BACK = ("all_to_all",), ("all_gather",)  # of a two-sided step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pause(seconds: float) -> None:
    """Stops this process, as a machine does that swaps or is moved to another host."""
    wakes = f"sleep {seconds}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["/bin/sh", "-c", wakes]):
        os.kill(os.getpid(), signal.SIGSTOP)


def before_collective(
    exchange: Exchange, number: int, do: Callable[[], None], of: Sequence[str] = ALL
) -> None:
    """Calls do() before this worker joins in a collective, the number-th of these kinds."""
    _instead(exchange, number, lambda collective, *arguments: do() or collective(*arguments), of)


def damage(exchange: Exchange, sender: int, byte: int, of: Sequence[str]) -> None:
    """Changes a byte of the payload of one sender, in what the next of these collectives brings."""

    def damaged(collective: Callable[..., Any], *arguments: Any) -> Any:
        payloads, work = collective(*arguments)
        work.wait()
        payloads[sender, byte] ^= 0xFF
        return payloads, work

    _instead(exchange, 1, damaged, of)


def _instead(
    exchange: Exchange, number: int, call: Callable[..., Any], names: Sequence[str]
) -> None:
    """Makes call(collective, ...) of the number-th collective, and leaves the others alone."""
    calls: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        collective = getattr(exchange, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) != number:
                return collective(*arguments)
            for each in names:
                delattr(exchange, each)
            return call(collective, *arguments)

        return counted

    for name in names:
        setattr(exchange, name, wrapped(name))
