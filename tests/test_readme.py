"""What the README says of the interface is so."""

import inspect
import re
from pathlib import Path

import pytest

import gmc_cuda

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
