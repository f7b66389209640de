"""examples/minimal.py on two workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gmc_cuda

EXAMPLE = Path(__file__).parent.parent / "examples" / "minimal.py"


def test_two_workers_learn():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"step (\d+): loss ([\d.]+), sent (\d+) B", done.stdout)
    steps, losses, sent = ([float(number) for number in column] for column in zip(*printed))
    assert steps == [100, 200, 300]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02
    parameters = 64 * 512 + 512 + 512 * 10 + 10
    entries = -(-parameters // 100)
    assert sent == 3 * [gmc_cuda.ops.payload_nbytes(parameters, entries)]
