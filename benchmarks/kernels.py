#!/usr/bin/env python3
"""Time the ops one at a time: compress, merge, apply; and what a user would pick instead.

    python benchmarks/kernels.py --quick           this machine's GPU, or its CPU
    python benchmarks/kernels.py --device cpu --numel 25e6 --density 0.01

See benchmarks/README.md for what is measured and how, and --help for the options.
"""

import sys

from bench.options import parse


def main() -> int:
    options = parse("kernels.py", __doc__.split("\n")[0], sys.argv[1:])

    from bench import goals
    from bench.session import Session

    return Session("kernels", options).run(measure, goals.for_kernels)


def measure(session, case) -> list[dict]:
    from bench import budget, peers
    from bench.problem import Problem
    from bench.session import bandwidth, peers_of
    from bench.timing import run_rounds

    problem = Problem(case, session.device)
    ours, reference = session.ours(problem), peers.add_gradient(problem)
    copy, copied = peers.copy(session.device)
    for_compress, for_merge = peers_of(session, problem) if session.with_peers(case) else ([], [])
    everyone = [ours, reference, copy, *for_compress, *for_merge]
    run_rounds(everyone, session.device, session.options.seconds, flush_stages=True)

    speed = bandwidth(copy, copied)
    repairs = session.repairs(problem, len(ours.total()))
    launches = session.launches(problem)
    sizes = {
        "compress": budget.compress(case),
        "merge": budget.merge(problem),
        "apply": budget.apply(problem),
    }
    records = []
    for op, nbytes in sizes.items():
        times = ours.total(op)
        record = session.record(op, case, times, nbytes, speed)
        record["launches"] = launches.get(op)
        records.append(record)
    compress, merge, _ = records
    compress |= repairs
    compress["reference"] = session.refer(reference, ours.total("compress"))
    compress["peers"] = [session.compare(one, ours.total("compress")) for one in for_compress]
    merge["peers"] = [session.compare(one, ours.total("merge")) for one in for_merge]
    return records


if __name__ == "__main__":
    sys.exit(main())
