"""What the maps of the tree say is what there is."""

import re
import subprocess
from pathlib import Path

import pytest

import gmc_cuda
import gmc_cuda._engine


def test_the_engines_map_lists_every_file():
    files = {path.stem for path in Path(gmc_cuda._engine.__file__).parent.glob("*.py")}
    listed = re.findall(r"^  (\w+)  +\S", gmc_cuda._engine.__doc__, flags=re.MULTILINE)
    assert sorted(listed) == sorted(files - {"__init__"})


def test_the_packages_map_lists_every_name():
    listed = set(re.findall(r"\w+", gmc_cuda.__doc__))
    assert set(gmc_cuda.__all__) <= listed


ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_trees_map_lists_every_file_and_folder():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the tree")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {path.parent for path in map(Path, done.stdout.split()) if path.name[0] != "."}
    files = {path for path in done.stdout.split() if "/" not in path}
    there = {"/".join(folder.parts[:depth]) + "/" for folder in folders for depth in (1, 2)}
    there = {name for name in there | files if not name.startswith((".", "/"))}
    listed, above = set(), ""
    tree = CONTRIBUTING.split("## Where things are")[1]
    for indent, name in re.findall(r"^    ( *)(\S+)  +\S", tree, flags=re.MULTILINE):
        above = above if indent else name
        listed.add(above + name if indent else name)
    assert sorted(listed) == sorted(there)


def test_the_map_of_csrc_lists_every_file():
    files = {
        str(path.relative_to(ROOT / "csrc"))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    listed, folder = set(), ""
    files_of = (ROOT / "csrc" / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    for indent, name in re.findall(r"^    ( *)([\w./]+)(?= |$)", files_of, flags=re.MULTILINE):
        if name.endswith("/"):
            folder = name
        elif len(indent) <= 2 and "." in name:
            listed.add((folder if indent else "") + name)
    assert sorted(listed) == sorted(files)


def test_the_benchmarks_map_lists_every_file():
    folder = ROOT / "benchmarks"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*.[pc][yu]")}
    section = (folder / "README.md").read_text().split("## Files")[1].split("## ")[0]
    listed = re.findall(r"`([\w/]+\.(?:py|cu))`", section)
    assert sorted(listed) == sorted(path for path in there if not path.endswith("__init__.py"))


def test_the_demos_map_lists_every_file():
    folder = ROOT / "examples" / "demo"
    listed = re.findall(r"^(\w+)  +\S", (folder / "__init__.py").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted({path.stem for path in folder.glob("*.py")} - {"__init__"})


def test_what_is_to_be_touched_is_there():
    def place(path):  # the package may be an installed one
        ours = path.startswith("gmc_cuda/")
        return (Path(gmc_cuda.__file__).parent.parent if ours else ROOT) / path

    table = CONTRIBUTING.split("## What to touch")[1].split("## ")[0]
    paths = re.findall(r"`((?:\w+/)+[\w.]*)`", table)
    assert len(paths) > 20
    assert [path for path in paths if not place(path).exists()] == []


def test_no_module_uses_anothers_private_names():
    sources = list(Path(gmc_cuda.__file__).parent.rglob("*.py"))
    texts = {path: path.read_text() for path in sources}
    defines = {
        path: set(
            re.findall(r"(?:def |self\.|^ *)(_[a-z]\w*)(?= *[(:=,])", text, flags=re.MULTILINE)
        )
        for path, text in texts.items()
    }
    ours = set().union(*defines.values()) - {"_replace", "_scale"}  # namedtuple's, GradScaler's
    found = [
        f"{path.name}: {match[0]}"
        for path, text in texts.items()
        for match in re.finditer(r"\b(?!self\b|cls\b)\w+\.(_[a-z]\w*)", text)
        if match[1] in ours - defines[path] and not match[0].startswith(("gmc_cuda.", "torch."))
    ]
    assert not found
