"""What the README says is so: its Python snippets run as they are, on four workers."""

import datetime
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gmc_cuda

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WHOLE_PROGRAM = "Train on several workers"  # test_minimal.py runs it


def snippets():
    """Heading of a section -> its snippets, one behind the other."""
    found: dict[str, str] = {}
    heading = ""
    for title, code in re.findall(r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", README, re.M | re.S):
        if title:
            heading = title
        elif WHOLE_PROGRAM not in code:
            found[heading] = found.get(heading, "") + code
    return found


def run(group, code, folder):
    """Returns whether the snippet trained the model."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 3)
    )
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)
    torch.manual_seed(1 + rank)
    names = {
        "torch": torch,
        "datetime": datetime,
        "gmc_cuda": gmc_cuda,
        "device": torch.device("cpu"),
        "rank": rank,
        "model": model,
        "loader": [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)],
        "loss_fn": torch.nn.functional.cross_entropy,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
        "step": 7,
    }
    for x, y in names["loader"][:1]:
        names["loss_fn"](model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    at_home = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
        for future in list(gmc_cuda.checkpoint._saving.values()):
            future.result()
    finally:
        os.chdir(at_home)
    return any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("heading", snippets())
def test_snippets(pool, heading, tmp_path):
    code = snippets()[heading]
    # The workers of the tests have been through this already.
    code = code.replace("torch.distributed.init_process_group(", "dict(")
    trains = "optimizer.step()" in code or "scaler.step(" in code
    assert pool.run(4, run, code, str(tmp_path)) == [trains] * 4


def test_every_section_with_a_promise_has_a_snippet():
    promised = {"Gradient clipping", "Mixed precision", "Non-finite gradients", "Checkpoints"}
    promised |= {"Resume, also on other workers", "Lost workers and time-outs"}
    assert promised <= snippets().keys()


def test_the_example_is_examples_minimal():
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert (ROOT / "examples" / "minimal.py").read_text() in blocks


def test_the_table_has_every_argument():
    def arguments(optimizer):
        return [name for name in inspect.signature(optimizer).parameters if name != "args"]

    (row,) = re.findall(r"^\| `GMC\((.*?)\)`", README, re.MULTILINE)
    assert row.replace("*, ", "").split(", ") == arguments(gmc_cuda.GMC)
    (row,) = re.findall(r"^\| `DGC\(\.\.\.\)` (.*?) \|", README, re.MULTILINE)
    without, plus = (re.findall(r"`(\w+)`", part) for part in row.split("plus"))
    assert set(arguments(gmc_cuda.DGC)) == set(arguments(gmc_cuda.GMC)) - set(without) | set(plus)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()
