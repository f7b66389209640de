"""A torch that was built without torch.distributed (USE_DISTRIBUTED=0), as on some platforms.

Such a torch is torch.distributed.is_available() == False, with hardly a name besides. Here the
installed one is made into that before its Python part looks: torch._C loses what tells that it was
built with it, and torch._C._distributed_c10d cannot be found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HIDING = """
import importlib.machinery, sys

class Loader:
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        for name in [n for n in dir(module) if "c10d" in n or "rpc" in n or "dist_auto" in n]:
            delattr(module, name)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch._C":
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            spec.loader = Loader(spec.loader)
            return spec
        if name.startswith("torch._C._distributed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder)
import torch
import torch.distributed as dist
assert not dist.is_available() and not hasattr(dist, "get_rank")
"""

MODEL = """
import gmc_cuda
torch.manual_seed(0)
model = torch.nn.Linear(8, 2)

def train(optimizer, steps=3):
    before = model.weight.clone()
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)

"""

USES = {
    "an optimizer": """
for make in (gmc_cuda.GMC, gmc_cuda.DGC):
    optimizer = make(model.parameters(), lr=0.01, density=0.25)
    train(optimizer)
    assert optimizer.stats()["steps"] == 3
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.average_memory_()
    train(optimizer)
""",
    "overlap": """
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.01, density=0.25, overlap=True)
train(optimizer)
""",
    "LocalUpdates": """
train(gmc_cuda.LocalUpdates(torch.optim.AdamW(model.parameters()), every=2), 4)
""",
    "a checkpoint": """
import tempfile
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.01, density=0.25)
train(optimizer)
with tempfile.TemporaryDirectory() as folder:
    gmc_cuda.checkpoint.save(folder, model, optimizer, {"step": 3})
    expected = [model.weight.clone(), optimizer.state[model.weight]["memory"].clone()]
    train(optimizer)
    assert gmc_cuda.checkpoint.load(folder, model, optimizer) == {"step": 3}
found = [model.weight, optimizer.state[model.weight]["memory"]]
assert all(map(torch.equal, found, expected))
""",
    "GradScaler": """
scaler = gmc_cuda.GradScaler("cpu")
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.01)
scaler.scale(model(torch.ones(3, 8)).sum()).backward()
scaler.step(optimizer)
scaler.update()
assert optimizer.stats()["steps"] == 1
""",
    "DensityWarmup": """
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.01, density=0.25)
scheduler = gmc_cuda.DensityWarmup(optimizer, 2)
train(optimizer)
scheduler.step()
""",
    "info": """
from gmc_cuda import info
assert info.main() == 0
""",
    "local_gradients, which has nothing to do": """
try:
    gmc_cuda.local_gradients(model)
except TypeError as error:
    assert "without one gradients are local already" in str(error)
else:
    raise AssertionError
""",
}


@pytest.mark.parametrize(
    "use", [pytest.param(use, marks=pytest.mark.slow if i else ()) for i, use in enumerate(USES)]
)
def test_one_worker_trains_with_a_torch_that_has_no_distributed(use):
    done = subprocess.run(
        [sys.executable, "-c", HIDING + MODEL + USES[use]],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
