"""One local step of the middle size with each exchange, for hardware counters.

    ncu --profile-from-start off python -m benchmarks.ops.counted

The steps before it, in which the guess settles, and the tensors' making are not counted.
"""

import sys
from dataclasses import replace

import torch

from benchmarks.ops.cases import choose
from benchmarks.ops.options import parse
from benchmarks.ops.session import WARM_UP
from benchmarks.ops.two_sided import make_problem

NUMEL = 124_000_000


def main() -> int:
    options = parse("python -m benchmarks.ops.counted", "Steps for ncu.", sys.argv[1:])
    centre, *_ = choose(options, options.numel or [NUMEL])
    for exchange in options.exchange:
        case = replace(centre, exchange=exchange)
        problem = make_problem(case, torch.device("cuda"))
        for turn in range(WARM_UP["cuda"] + 1):
            if turn == WARM_UP["cuda"]:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            for stage in problem.stages():
                stage.call(turn)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"counted: a step of {case.numel:,} elements, {exchange}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
