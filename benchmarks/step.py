#!/usr/bin/env python3
"""Time the whole local step, compress + merge + apply, next to torch's fused SGD with momentum.

    python benchmarks/step.py --quick              this machine's GPU, or its CPU

See benchmarks/README.md for what is measured and how, and --help for the options.
"""

import sys

from bench.options import parse


def main() -> int:
    options = parse("step.py", __doc__.split("\n")[0], sys.argv[1:])

    from bench import goals
    from bench.session import Session

    return Session("step", options).run(measure, goals.for_step)


def measure(session, case) -> list[dict]:
    from bench import budget, peers
    from bench.problem import Problem
    from bench.session import bandwidth
    from bench.timing import run_rounds, summary

    problem = Problem(case, session.device)
    ours, reference = session.ours(problem), peers.fused_sgd(problem)
    copy, copied = peers.copy(session.device)
    run_rounds([ours, reference, copy], session.device, session.options.seconds)

    times = ours.total()
    nbytes = budget.compress(case) + budget.merge(problem) + budget.apply(problem)
    record = session.record("step", case, times, nbytes, bandwidth(copy, copied))
    record |= session.repairs(problem, len(times))
    record["stages"] = {
        name: summary(list(stage.values())).to_json() for name, stage in ours.seconds.items()
    }
    record["reference"] = {**session.refer(reference, times), "bytes": budget.sgd(case)}
    launches = session.launches(problem)
    if launches:
        record["launches"] = {
            kind: sum(one[kind] for one in launches.values())
            for kind in ("kernels", "fills_and_copies")
        }
    return [record]


if __name__ == "__main__":
    sys.exit(main())
