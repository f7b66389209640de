"""Train with GMC next to dense momentum SGD, DGC and memory SGD, on real data.

    python -m examples.demo                                     a language model, four workers
    python -m examples.demo --task digits --non-iid             digits, few classes on each worker
    torchrun --nproc-per-node=4 -m examples.demo --steps 100    the same under your own torchrun

Start it at the root of the repository. Started plainly it runs torchrun on this machine; with RANK
in the environment it is one worker. See --help for the options.
"""

import os
import signal
import sys

from examples.demo.options import parse


def main() -> int:
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher tells; no traceback per worker
    options = parse(sys.argv[1:])
    # What follows imports torch, for which a mistake on the command line need not wait.
    if "RANK" in os.environ:
        from examples.demo import worker

        return worker.run(options)
    from examples.demo import launch

    return launch.run(options, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
