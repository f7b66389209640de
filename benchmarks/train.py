#!/usr/bin/env python3
"""Train with GMC next to dense momentum SGD, DGC and memory SGD, on real data.

    python benchmarks/train.py                           a language model, four workers started here
    python benchmarks/train.py --task digits --non-iid   digits, few classes on each worker
    torchrun --nproc-per-node=4 benchmarks/train.py ...  the same on one machine or on many

Started plainly it is the supervisor of the workers it starts; started with RANK in the environment
(by that supervisor or by torchrun) it is one worker. See --help for the options.
"""

import os
import sys

from demo import supervisor
from demo.options import parse


def main() -> int:
    options = parse(sys.argv[1:])
    if "RANK" not in os.environ:
        return supervisor.run(options.workers, [os.path.abspath(__file__), *sys.argv[1:]])

    from demo import worker  # imports torch, which the supervisor does not need

    return worker.run(options)


if __name__ == "__main__":
    sys.exit(main())
