"""Train with GMC next to dense momentum SGD, DGC and memory SGD, on real data.

    python examples/compare_methods                           a language model, four workers
    python examples/compare_methods --task digits --non-iid   digits, few classes on each worker
    torchrun --nproc-per-node=4 examples/compare_methods ...  the same on one machine or on many

Started plainly it is the supervisor of the workers it starts; started with RANK in the environment
(by that supervisor or by torchrun) it is one worker. See --help for the options.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it is a package
from compare_methods import supervisor  # noqa: E402
from compare_methods.options import parse  # noqa: E402


def main() -> int:
    options = parse(sys.argv[1:])
    if "RANK" not in os.environ:
        return supervisor.run(options.workers, [str(Path(__file__).parent), *sys.argv[1:]])

    from compare_methods import worker  # imports torch, which the supervisor does not need

    return worker.run(options)


if __name__ == "__main__":
    sys.exit(main())
