"""The framework examples: two workers train, save, and resume as if they had not stopped."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS, SAVED_AT = 30, 20


def torchrun(script, workers, *arguments):
    """Runs an example and returns what it printed, without what torchrun says itself."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={workers}", str(ROOT / "examples" / script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(folder):
    return {int(k): v for k, v in json.loads((folder / "losses.json").read_text()).items()}


@pytest.mark.parametrize(
    "framework,script",
    [
        ("transformers", "trainer.py"),
        ("accelerate", "with_accelerate.py"),
        ("lightning", "with_lightning.py"),
    ],
)
def test_example_trains_saves_and_resumes(framework, script, tmp_path):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (pip install gmc_cuda[frameworks])")
    run = ("--folder", tmp_path, "--steps", STEPS, "--save-every", SAVED_AT)
    printed = torchrun(script, 2, *run)
    straight = losses(tmp_path)
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert straight[STEPS] < straight[1] - 1.5
    (tmp_path / "losses.json").unlink()
    printed += torchrun(script, 2, *run, "--resume")
    resumed = losses(tmp_path)
    # Both runs averaged memory when they saved; besides that, stopping must not be seen.
    for step in range(SAVED_AT + 1, STEPS + 1):
        assert abs(resumed[step] - straight[step]) < 1e-3, (step, straight, resumed)
    complaints = re.findall(
        r".*(?:sent the same payload|was saved by rank|gmc_cuda\S*:\d+).*", printed
    )
    assert not complaints, printed
