"""Rounds in which everything takes its turn, so that ratios hold on a machine that is not quiet.

In a round each participant runs once, in an order drawn anew; ratios are taken within a round and
the median over rounds is reported. On the CPU a stage is timed by a clock, on a GPU by events.
Before a participant starts on a GPU, a buffer larger than the L2 cache is overwritten and another
one is read: its inputs are then in no cache, and the host gets ahead of the device, so that gaps
between launches are not counted. The reading leaves nothing in the cache that is still to be
written to memory, which the participant would have to wait for.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

FLUSH_BYTES, READ_BYTES = 2**30, 2**28
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Stage:
    name: str
    call: Callable[[int], object]
    timed: bool = True


@dataclass
class Participant:
    """Something to time: its stages are run one after the other.

    Attributes:
        warm_up: rounds before timing; ours needs some for its guess to settle.
        cap: seconds that one round may take, else it is skipped.
        every_round: also if it is slow.
        settled: called between the warm-up and the first timed round.
        seconds: by stage, the rounds' times by number of the round.
        skipped: why there are none, in one line.
    """

    name: str
    stages: list[Stage]
    warm_up: int = WARM_UP_CALLS
    cap: float = float("inf")
    every_round: bool = False
    settled: Callable[[], None] | None = None
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    skipped: str = ""

    def total(self, *names: str) -> dict[int, float]:
        """By round, the sum over these stages; over all timed ones if none is named."""
        chosen = [self.seconds[n] for n in (names or self.seconds) if n in self.seconds]
        if not chosen or self.skipped:
            return {}
        return {turn: sum(times[turn] for times in chosen) for turn in chosen[0]}


@dataclass(frozen=True)
class Summary:
    median: float
    low: float  # 25th percentile
    high: float  # 75th percentile
    least: float
    rounds: int

    def to_json(self) -> dict:
        return {
            "median_seconds": self.median,
            "p25_seconds": self.low,
            "p75_seconds": self.high,
            "min_seconds": self.least,
            "rounds": self.rounds,
        }


def summary(values: list[float]) -> Summary:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Summary(median(values), low, high, min(values), len(values))


def ratio(times: dict[int, float], others: dict[int, float]) -> dict[str, float]:
    """times over others, within each round that has both, as in the JSON file.

    The ratio of the two shortest times is there too: where other programs take the cores away,
    it says more than the median.
    """
    values = summary([times[turn] / others[turn] for turn in times if turn in others])
    return {
        "median": values.median,
        "p25": values.low,
        "p75": values.high,
        "of_shortest": min(times.values()) / min(others.values()),
        "rounds": values.rounds,
    }


def run_rounds(
    participants: list[Participant],
    device: torch.device,
    seconds: float,
    flush_stages: bool = False,
) -> None:
    """Fills in `seconds` or `skipped` of each participant.

    Args:
        seconds: about how long the timed rounds may take together.
        flush_stages: on a GPU, flush before each stage, not only before the first.
    """
    clock = _Clock(device, flush_stages)
    strides = {}
    # A slow peer runs in every m-th round only, so that it does not eat the others' time.
    share = seconds / (2 * MIN_ROUNDS * len(participants))
    for one in participants:
        took = _warm_up(one, clock)
        strides[one.name] = 1 if one.every_round else max(1, int(took / share))
    order = random.Random(0)
    deadline = time.monotonic() + seconds
    slowest = max((strides[one.name] for one in participants if not one.skipped), default=1)
    least = max(MIN_ROUNDS, min(slowest * 2 + 1, MAX_ROUNDS))
    for turn in range(MAX_ROUNDS):
        late = time.monotonic() > deadline
        very_late = time.monotonic() > deadline + seconds
        if turn >= MIN_ROUNDS and late and (turn >= least or very_late):
            break
        active = [p for p in participants if not p.skipped and turn % strides[p.name] == 0]
        for one in order.sample(active, len(active)):
            for name, took in clock.run(one, turn).items():
                one.seconds.setdefault(name, {})[turn] = took


def _warm_up(one: Participant, clock: "_Clock") -> float:
    """Seconds of the last warm-up round, or zero if it cannot run."""
    took = 0.0
    try:
        for turn in range(one.warm_up):
            start = time.monotonic()
            clock.run(one, turn)
            took = time.monotonic() - start
            if turn and took > one.cap:
                one.skipped = f"one call takes {took:.1f} s, over the cap of {one.cap:.1f} s"
                return 0.0
    except Exception as error:
        if one.cap == float("inf"):  # ours, or the reference: nothing to report without it
            raise
        words = str(error).strip().splitlines() or [""]
        one.skipped = f"{type(error).__name__}: {words[0]}"[:160]
        return 0.0
    if one.settled:
        one.settled()
    return took


class _Clock:
    def __init__(self, device: torch.device, flush_stages: bool) -> None:
        self.device, self.flush_stages = device, flush_stages
        self.buffer = None
        if device.type == "cuda":
            self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.read = torch.zeros(READ_BYTES // 4, device=device)

    def run(self, one: Participant, turn: int) -> dict[str, float]:
        if self.buffer is None:
            return self._run_on_host(one, turn)
        events, flushed = {}, False
        for stage in one.stages:
            if not stage.timed:
                stage.call(turn)
                continue
            if self.flush_stages or not flushed:
                self.buffer.zero_()
                self.read.sum()
                flushed = True
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            stage.call(turn)
            end.record()
            events[stage.name] = start, end
        torch.cuda.synchronize(self.device)
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

    def _run_on_host(self, one: Participant, turn: int) -> dict[str, float]:
        times = {}
        for stage in one.stages:
            start = time.perf_counter()
            stage.call(turn)
            if stage.timed:
                times[stage.name] = time.perf_counter() - start
        return times
