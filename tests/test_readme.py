"""What the README says is so: its Python snippets run as they are, on four workers."""

import contextlib
import datetime
import functools
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import same_on_all_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WHOLE_PROGRAM = "Train on several workers"  # test_minimal.py runs it


def blocks():
    """Name of a Python block, by its section and number there -> its code."""
    found: dict[str, str] = {}
    heading, number = "", 0
    for title, code in re.findall(r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", README, re.M | re.S):
        if title:
            heading, number = title, 0
        elif WHOLE_PROGRAM not in code:
            number += 1
            found[f"{heading} {number}"] = code
    return found


def example_of(code):
    """The program in examples/ that a framework's block is taken from."""
    module = re.match(r"from gmc_cuda\.integrations\.(\w+) import", code)
    names = {"transformers": "trainer.py", "accelerate": "with_accelerate.py"}
    return names.get(module[1], f"with_{module[1]}.py") if module else None


def run(group, code, folder):
    """Returns whether the block trained the model; where it makes an optimizer, that must train."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 3)
    )
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)
    torch.manual_seed(1 + rank)
    names = {
        "torch": torch,
        "contextlib": contextlib,
        "datetime": datetime,
        "functools": functools,
        "gmc_cuda": gmc_cuda,
        "device": torch.device("cpu"),
        "rank": rank,
        "nodes": 2,
        "per_node": 2,
        "model": model,
        "loader": [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)],
        "loss_fn": torch.nn.functional.cross_entropy,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
        "step": 7,
    }
    if "fully_shard" not in code:  # which takes a model without gradients
        for x, y in names["loader"][:1]:
            names["loss_fn"](model(x), y).backward()
    before = weights(model)
    at_home = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(at_home)
    trained = not torch.equal(before, weights(model))
    if names["optimizer"] is not optimizer:
        before = weights(model)
        for x, y in names["loader"]:
            names["optimizer"].zero_grad()
            names["loss_fn"](names.get("ddp_model", model)(x), y).backward()
            names["optimizer"].step()
        after = weights(model)
        assert after.isfinite().all() and not torch.equal(before, after)
        if isinstance(names["optimizer"], gmc_cuda.LocalUpdates):
            names["optimizer"].synchronize()
        assert same_on_all_ranks(group, [weights(model)])
    return trained


def weights(model):
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().reshape(-1).clone()
                      for p in model.parameters()])  # fmt: skip


@pytest.mark.parametrize("name", [name for name, code in blocks().items() if not example_of(code)])
def test_block(pool, name, tmp_path):
    code = blocks()[name]
    # The workers of the tests have been through this already.
    code = code.replace("torch.distributed.init_process_group(", "dict(")
    # What inductor would add takes minutes.
    code = code.replace("torch.compile(model)", 'torch.compile(model, backend="aot_eager")')
    trains = "optimizer.step()" in code or "scaler.step(" in code
    assert pool.run(4, run, code, str(tmp_path)) == [trains] * 4


@pytest.mark.parametrize("name", [name for name, code in blocks().items() if example_of(code)])
def test_block_of_a_framework_is_taken_from_its_example(name):
    """test_integrations.py runs the examples, where the frameworks are installed."""
    code = blocks()[name]
    rest = iter((ROOT / "examples" / example_of(code)).read_text().splitlines())
    rest = iter([line.strip() for line in rest])
    for line in filter(None, map(str.strip, code.splitlines())):
        assert line in rest, f"{line!r} does not follow in examples/{example_of(code)}"


def test_every_stack_has_a_block():
    """The links of the table of stacks lead to sections with code."""
    (table,) = re.findall(r"^\| your stack .*?\n\n", README, re.M | re.S)
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 11
    anchor = lambda title: re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")  # noqa: E731
    with_code = {anchor(name.rpartition(" ")[0]) for name in blocks()}
    for row in rows:
        (target,) = re.findall(r"\]\(#([^)]*)\)", row)
        assert target in with_code, row


def test_every_section_with_a_promise_has_code():
    promised = {"Gradient clipping", "Mixed precision", "Non-finite gradients", "Checkpoints"}
    promised |= {"Resume, also on other workers", "Lost workers and time-outs"}
    assert promised <= {name.rpartition(" ")[0] for name in blocks()}


def test_the_example_is_examples_minimal():
    assert (ROOT / "examples" / "minimal.py").read_text() in README


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
