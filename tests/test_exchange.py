"""Which workers an optimizer trains with: never silently the wrong ones."""

import os
import subprocess
import sys
import warnings

import pytest
from problems import parameters

import gmc_cuda

LATE = """
import torch, torch.distributed as dist, gmc_cuda
param = torch.nn.Parameter(torch.ones(8))
optimizer = gmc_cuda.GMC([param], lr=0.1)
param.grad = torch.ones(8)
dist.init_process_group("gloo")
before = param.detach().clone()
try:
    optimizer.step()
except RuntimeError as error:
    assert "torch.distributed was initialised after this optimizer was constructed" in str(error)
    assert torch.equal(param, before) and not optimizer.state[param]["memory"].any()
    print("refused", flush=True)
dist.destroy_process_group()
"""


def test_a_group_that_appears_after_construction(tmp_path):
    """It would train each worker alone, and the weights would drift apart."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 2
    assert "WORLD_SIZE is 2, but torch.distributed is not initialised" in done.stderr


def test_a_worker_alone_under_torchrun_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 4, but torch.distributed is not init"):
        gmc_cuda.GMC(parameters(), lr=0.1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmc_cuda.GMC(parameters(), lr=0.1)
