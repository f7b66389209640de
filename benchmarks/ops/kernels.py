#!/usr/bin/env python3
"""Time the ops one at a time: compress, merge, apply; and what a user would pick instead.

    python -m benchmarks.ops.kernels --quick           this machine's GPU, or its CPU
    python -m benchmarks.ops.kernels --device cpu --numel 25e6 --density 0.01

See benchmarks/README.md for what is measured and how, and --help for the options.
"""

import sys

from benchmarks.ops import budget, goals, peers, session
from benchmarks.ops.cases import Case
from benchmarks.ops.timing import run_rounds
from benchmarks.ops.two_sided import make_problem


def measure(run: session.Session, case: Case) -> list[dict]:
    problem = make_problem(case, run.device)
    ours, reference = run.ours(problem), peers.add_gradient(problem)
    copy, copied = peers.copy(run.device)
    for_compress, for_merge = session.peers_of(run, problem) if run.with_peers(case) else ([], [])
    everyone = [ours, reference, copy, *for_compress, *for_merge]
    run_rounds(everyone, run.device, run.options.seconds, flush_stages=True)

    speed = session.bandwidth(copy, copied)
    repairs = run.repairs(problem, len(ours.total()))
    launches = run.launches(problem)
    records = {}
    for op, nbytes in budget.by_op(problem).items():
        times = ours.total(op)
        record = run.record(op, case, times, nbytes, speed)
        record["launches"] = launches.get(op)
        records[op] = record
    compress, merge = records["compress"], records["merge"]
    compress |= repairs
    compress["reference"] = run.refer(reference, ours.total("compress"))
    compress["peers"] = [run.compare(one, ours.total("compress")) for one in for_compress]
    merge["peers"] = [run.compare(one, ours.total("merge")) for one in for_merge]
    return list(records.values())


def main() -> int:
    return session.main("kernels", __doc__ or "", measure, goals.for_kernels)


if __name__ == "__main__":
    sys.exit(main())
