"""Which workers an optimizer trains with: never silently the wrong ones."""

import os
import subprocess
import sys
import warnings

import pytest

import gmc_cuda
from support import scripts
from support.problems import parameters

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
dist.barrier()  # one that ends while the other still connects would fail it
dist.destroy_process_group()
"""


def test_a_group_that_appears_after_construction(tmp_path):
    """It would train each worker alone, and the weights would drift apart."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    done = scripts.run(script, workers=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 2
    assert "WORLD_SIZE is 2, but torch.distributed is not initialised" in done.stderr


ENDS_AT_ONCE = """
import os, sys
import torch, torch.distributed as dist
from gmc_cuda._engine.exchange import Exchange
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.setswitchinterval(5)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
exchange = Exchange(None)
for _ in range(20):
    gathered, work = exchange.all_gather(torch.zeros(100, dtype=torch.uint8))
    work.wait()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's sched_setaffinity")
def test_a_script_may_end_right_after_a_step(tmp_path):
    """gloo's threads let go of tensors later, and abort when the interpreter has ended by then."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", ENDS_AT_ONCE]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")],
                         env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    told = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told


def test_a_worker_alone_under_torchrun_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 4, but torch.distributed is not init"):
        gmc_cuda.GMC(parameters(), lr=0.1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmc_cuda.GMC(parameters(), lr=0.1)
