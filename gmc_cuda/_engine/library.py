"""Loads the compiled libraries, or raises ImportError with the command that builds them.

Importing this module registers `torch.ops.gmc_cuda.*` from a library that uses only torch's stable
binary interface, so that one build works with every torch from 2.11 on. It also imports
`gmc_cuda._C`, which is built for one Python version and does not use torch.

    extension     the module gmc_cuda._C
    build_config  how both were built: version, python, torch (of the headers), target_torch,
                  with_cuda, cuda (toolkit version or None), arch_list, compiler, cxx_flags,
                  nvcc_flags, cplusplus, summary
"""

import importlib
import json
import platform
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 11)


def read_record(package: Path = _PACKAGE) -> dict[str, Any] | None:
    """The record that the build wrote beside the libraries; None if there is no build."""
    try:
        record: dict[str, Any] = json.loads((package / "_build_config.json").read_text())
    except FileNotFoundError:
        return None
    return record


def build_command(package: Path = _PACKAGE) -> str:
    """The shell command that builds the package for the Python that is running."""
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation --no-deps"
    if (package.parent / "setup.py").exists():
        return f"{pip} -e {shlex.quote(str(package.parent))}"
    return f"{pip} --force-reinstall .   (in the folder of gmc_cuda's sources)"


def check_torch(version: str) -> None:
    """Raises ImportError if this version of torch, such as "2.11.0+cpu", is too old."""
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"gmc_cuda needs torch {oldest} or later; this is torch {version}. Upgrade it:\n"
            f"    {shlex.quote(sys.executable)} -m pip install --upgrade 'torch>={oldest}'"
        )


def explain(record: dict[str, Any] | None, reason: str = "") -> str:
    """The text of the ImportError for libraries that are missing or do not load."""
    python = platform.python_version()
    if sys.platform != "linux":
        return (
            f"gmc_cuda runs on Linux only, and this is {sys.platform}. On Windows use it inside "
            "WSL 2, elsewhere in a Linux container"
        )
    if record is None:
        problem = f"is not built: there is no compiled extension for Python {python} in this folder"
    elif record["python"].split(".")[:2] != python.split(".")[:2]:
        problem = f"is built for Python {record['python']}, and this is Python {python}"
    else:
        problem = f"does not load: {reason}"
    return f"gmc_cuda {problem}. Build it:\n    {build_command()}"


def load() -> tuple[ModuleType, dict[str, Any]]:
    """Loads both libraries, or raises ImportError with the command to run."""
    check_torch(torch.__version__)
    record = read_record()
    try:
        module = importlib.import_module("gmc_cuda._C")
        torch.ops.load_library(_PACKAGE / "_ops.so")
    except ModuleNotFoundError as error:
        if error.name != "gmc_cuda._C":
            raise
        raise ImportError(explain(record, "gmc_cuda._C is missing")) from None
    except (ImportError, OSError) as error:
        raise ImportError(explain(record, str(error.__cause__ or error))) from None
    own = module.build_config()
    return module, {**own, **(record or {}), "with_cuda": own["with_cuda"]}


extension, build_config = load()
