"""What the maps of the tree say is what there is."""

import re
from fnmatch import fnmatch
from pathlib import Path

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


def place(path):
    """Where a path of the tree is; the package may be an installed one."""
    inside = path == "gmc_cuda" or path.startswith("gmc_cuda/")
    return (Path(gmc_cuda.__file__).parent.parent if inside else ROOT) / path


def kept(folder):
    """Names of what is in a folder and is not made there; those of folders end with a slash."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for path in place(folder).iterdir():
        names = (path.name, folder + path.name)
        made = any(fnmatch(name, pattern) for name in names for pattern in ignored)
        if not made and not path.name.startswith("."):
            yield path.name + "/" * path.is_dir()


def test_the_trees_map_lists_every_file_and_folder():
    there = {*kept(""), "gmc_cuda/"}
    for folder in [name for name in there if name.endswith("/")]:
        there |= {folder + name for name in kept(folder) if name.endswith("/")}
    listed, above = set(), ""
    tree = CONTRIBUTING.split("## Where things are")[1]
    for indent, name in re.findall(r"^    ( *)(\S+)  +\S", tree, flags=re.MULTILINE):
        above = above if indent else name
        listed.add(above + name if indent else name)
    assert sorted(listed) == sorted(there)


def test_what_is_to_be_touched_is_there():
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
