#!/usr/bin/env python3
"""Time the whole local step, compress + merge + apply, next to torch's fused SGD with momentum.

    python -m benchmarks.ops.step --quick              this machine's GPU, or its CPU

See benchmarks/README.md for what is measured and how, and --help for the options.
"""

import sys

from benchmarks.ops import budget, goals, peers, session
from benchmarks.ops.cases import Case
from benchmarks.ops.timing import run_rounds, summary
from benchmarks.ops.two_sided import make_problem


def measure(run: session.Session, case: Case) -> list[dict]:
    problem = make_problem(case, run.device)
    ours, reference = run.ours(problem), peers.fused_sgd(problem)
    copy, copied = peers.copy(run.device)
    run_rounds([ours, reference, copy], run.device, run.options.seconds)

    times = ours.total()
    nbytes = sum(budget.by_op(problem).values())
    record = run.record("step", case, times, nbytes, session.bandwidth(copy, copied))
    record |= run.repairs(problem, len(times))
    record["stages"] = {
        name: summary(list(stage.values())).to_json() for name, stage in ours.seconds.items()
    }
    record["reference"] = {**run.refer(reference, times), "bytes": budget.sgd(case)}
    launches = run.launches(problem)
    if launches:
        record["launches"] = {
            kind: sum(one[kind] for one in launches.values())
            for kind in ("kernels", "fills_and_copies")
        }
    return [record]


def main() -> int:
    return session.main("step", __doc__ or "", measure, goals.for_step)


if __name__ == "__main__":
    sys.exit(main())
