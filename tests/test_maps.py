"""What the maps of the tree say is what there is."""

import re
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
