"""examples/minimal.py on two workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "minimal.py"


def test_two_workers_learn():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"step (\d+): loss ([\d.]+), sent (\d+) B", done.stdout)
    steps, losses, sent = ([float(number) for number in column] for column in zip(*printed))
    assert steps == [100, 200, 300]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.02  # it starts above 0.3
    parameters = 64 * 512 + 512 + 512 * 10 + 10
    assert all(40 < 4 * parameters / nbytes < 100 for nbytes in sent), sent
