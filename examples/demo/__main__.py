"""Train with GMC next to dense momentum SGD, DGC and memory SGD, on real data.

    python -m examples.demo                           a language model, four workers
    python -m examples.demo --task digits --non-iid   digits, few classes on each worker
    torchrun --nproc-per-node=4 -m examples.demo ...  the same on one machine or on many

Started plainly it is the supervisor of the workers it starts; started with RANK in the environment
(by that supervisor or by torchrun) it is one worker. See --help for the options.
"""

import os
import sys

from examples.demo import supervisor
from examples.demo.options import parse


def main() -> int:
    options = parse(sys.argv[1:])
    if "RANK" not in os.environ:
        return supervisor.run(options.workers, ["-m", "examples.demo", *sys.argv[1:]])

    from examples.demo import worker  # imports torch, which the supervisor does not need

    return worker.run(options)


if __name__ == "__main__":
    sys.exit(main())
