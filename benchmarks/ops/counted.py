"""One local step of the middle size, for hardware counters: `ncu --profile-from-start off`.

    ncu --profile-from-start off python -m benchmarks.ops.counted

The steps before it, in which the guess settles, and the tensors' making are not counted.
"""

import sys

import torch

from benchmarks.ops.cases import choose
from benchmarks.ops.options import parse
from benchmarks.ops.problem import Problem
from benchmarks.ops.session import WARM_UP

NUMEL = 124_000_000


def main() -> int:
    options = parse("python -m benchmarks.ops.counted", "One step for ncu.", sys.argv[1:])
    case, *_ = choose(options, options.numel or [NUMEL])
    problem = Problem(case, torch.device("cuda"))
    for turn in range(WARM_UP["cuda"]):
        for stage in problem.stages():
            stage.call(turn)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for stage in problem.stages():
        stage.call(WARM_UP["cuda"])
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print(f"counted: a step of {case.numel:,} elements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
