"""A long run in which everything goes wrong that can, checked at every step. Needs no GPU.

    make soak                         2,000 steps with each exchange, some ten minutes
    make soak ARGS='--steps 120'      a short form

Four workers train with GMC while gradients hold NaN and Inf or are missing, learning rate and
density change, loss scaling overflows, workers pause and get damaged payloads. Workers are killed,
one comes too late, one gets damage that the others know nothing of, and each time the run is
resumed: from a checkpoint on four workers and on three, and from an averaged memory. At every step
the mass equation must hold (equation.py says it, and what a missing gradient means), weights must
be the same on all workers, and a step made again after a resume must give the same bits. Prints a
table; status 1 if anything did not hold.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from soak.equation import check_lost
from soak.plan import BEFORE_ANSWER, EXCHANGES, LEAST_STEPS, TIME_OUT, TOO_LONG, Life, Plan
from soak.worker import Report, live
from support.workers import Workers

PATIENCE = 600  # seconds for a life of the workers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=2000, help=f"at least {LEAST_STEPS} (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exchange", choices=EXCHANGES, help="default: one run with each")
    options = parser.parse_args(arguments)
    if options.steps < LEAST_STEPS:
        parser.error(f"--steps: must be at least {LEAST_STEPS}")
    for exchange in [options.exchange] if options.exchange else EXCHANGES:
        print(f'exchange="{exchange}"')
        soak(Plan(options.steps, options.seed, exchange))
    return 0


def soak(plan: Plan) -> None:
    """Prints a line for each life, and the table; raises SystemExit if anything did not hold."""
    started, reports = time.monotonic(), []
    weights: dict[int, int] = {}
    changed: list[int] = []  # steps from which a life had other memory or workers than before
    size: int | None = None
    with tempfile.TemporaryDirectory(prefix="gmc-soak-") as folder:
        for number, life in enumerate(plan.lives()):
            reports.append(run(plan, life, Path(folder), number))
            print(describe(number, life, reports[-1]), flush=True)
            # A resume from before a change does not make the steps after it again.
            first = min(reports[-1].weights, default=plan.steps + 1)
            while changed and first <= changed[-1]:
                weights = before(changed.pop(), weights)
            if life.start == "average" or life.size != size:
                changed.append(first)
                weights = before(first, weights)
            size = life.size
            again = weights.keys() & reports[-1].weights.keys()
            differing = [step for step in again if weights[step] != reports[-1].weights[step]]
            if differing:
                raise SystemExit(f"step {min(differing)}, made again, gave other weights")
            weights |= reports[-1].weights
    if len(weights) != plan.steps:
        raise SystemExit(f"{len(weights)} of {plan.steps} steps were made")
    for what, figure in figures(plan, reports, time.monotonic() - started):
        print(f"{what:<45} {figure}")


def before(end: int, weights: dict[int, int]) -> dict[int, int]:
    return {step: bits for step, bits in weights.items() if step < end}


def run(plan: Plan, life: Life, folder: Path, number: int) -> Report:
    """Starts a life's workers and waits for their end; raises SystemExit if something broke."""
    meeting = folder / f"life-{number}"
    meeting.mkdir()
    seconds = TIME_OUT if life.event == TOO_LONG else 60
    with Workers(life.size, meeting, live, plan, life, folder, seconds=seconds) as workers:
        # All at once: a report fills its pipe, so its worker ends only when it is heard, and by
        # its end the others learn that the group is lost.
        with ThreadPoolExecutor(life.size) as pool:
            heard = dict(enumerate(pool.map(partial(hear, workers), workers.ranks)))
    for rank, report in heard.items():
        expected = life.ends(rank)
        ended = "killed" if report is None else getattr(report, "ended", report)
        if ended != expected:
            raise SystemExit(f"life {number}: rank {rank} should be {expected}, but ended: {ended}")
    reports = {rank: report for rank, report in heard.items() if isinstance(report, Report)}
    if life.event == BEFORE_ANSWER:
        # What the workers have sent each other is with its owners, and nothing is there twice.
        lost = {rank: report.lost for rank, report in reports.items()}
        if None in lost.values():
            raise SystemExit(f"life {number}: not all workers have lost step {life.last}")
        check_lost(list(lost.values()), lost[life.victim].owned)
        del reports[life.victim]
    first, *others = reports.values()
    for report in others:
        # One may have made a step more when a worker was killed.
        for step in report.weights.keys() & first.weights.keys():
            if report.weights[step] != first.weights[step]:
                raise SystemExit(f"life {number}: weights differ between workers after step {step}")
    return first


def hear(workers: Workers, rank: int) -> Report | AssertionError | None:
    """None from a worker that ended without a word."""
    try:
        return workers.hear(rank, PATIENCE)
    except EOFError:
        return None
    except AssertionError as failure:
        return failure


def describe(number: int, life: Life, report: Report) -> str:
    end = "stopped"
    if life.victim is not None:
        end = f"rank {life.victim} {life.event}"
    start = {"fresh": "new", "checkpoint": "from a checkpoint", "average": "from averaged memory"}
    last = max(report.weights, default=report.resumed)
    return (
        f"life {number}: {life.size} workers, {start[life.start]}, "
        f"steps {report.resumed + 1} to {last}, {end}"
    )


def figures(plan: Plan, reports: list[Report], seconds: float) -> list[list[str]]:
    faults = sum((report.faults for report in reports), Counter())
    made = sum(len(report.weights) for report in reports)
    scales = set().union(*(report.scales for report in reports))
    rows = [
        ["steps, and made again after a resume", f"{plan.steps}, {made - plan.steps}"],
        *([kind, str(count)] for kind, count in sorted(faults.items())),
        ["loss scale, smallest and largest", f"{min(scales):g}, {max(scales):g}"],
        ["mass equation: largest relative error", f"{max(r.largest_error for r in reports):.1e}"],
        ["steps with the same weights on all workers", f"all {made}"],
        ["comparisons by check_replicas_every", str(sum(r.replica_checks for r in reports))],
        ["norm of one worker's memory at the end", f"{reports[-1].unsent:.4g}"],
        ["minutes", f"{seconds / 60:.1f}"],
    ]
    return rows


if __name__ == "__main__":
    sys.exit(main())
