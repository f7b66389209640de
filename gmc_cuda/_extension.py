"""Loads the compiled extension, or says what is wrong with it and how to build it.

Importing this module imports `gmc_cuda._C`, which registers `torch.ops.gmc_cuda.*`. The extension
uses torch's C++ interface, which changes from one minor version of torch to the next without
always failing to load, so versions are compared before anything is loaded.

    extension     the module gmc_cuda._C
    build_config  how it was built: version, python, torch, with_cuda, cuda (toolkit version or
                  None), arch_list, compiler, cxx_flags, nvcc_flags, cplusplus, openmp, summary
"""

import importlib
import json
import platform
import shlex
import sys
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


def read_record(package=_PACKAGE):
    """What the build wrote beside the extension, or None if there was no build."""
    try:
        return json.loads((package / "_build_config.json").read_text())
    except FileNotFoundError:
        return None


def build_command(package=_PACKAGE):
    """The shell command that builds the extension for the Python that is running."""
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation --no-deps"
    if (package.parent / "setup.py").exists():
        return f"{pip} -e {shlex.quote(str(package.parent))}"
    return f"{pip} --force-reinstall .   (in the folder of gmc_cuda's sources)"


def environment():
    """The running Python and torch, under the names that a build records."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def fits(built, here):
    """Whether an extension built as `built` may be loaded in the environment `here`."""

    def release(version):
        return version.split(".")[:2]

    if any(release(built[name]) != release(here[name]) for name in ("torch", "python")):
        return False
    if not built.get("cuda"):  # the CPU part alone works with every torch
        return True
    return bool(here["cuda"]) and here["cuda"].split(".")[0] == built["cuda"].split(".")[0]


def explain(built, here, command):
    """The text of the ImportError: what it was built for, what there is, how to build it."""
    if built is None:
        return (
            f"gmc_cuda is not built: there is no compiled extension for Python {here['python']} "
            f"in this folder. Build it:\n    {command}"
        )

    def describe(versions):
        cuda = f"CUDA {versions['cuda']}" if versions.get("cuda") else "no CUDA"
        return f"torch {versions['torch']}, {cuda}, Python {versions['python']}"

    return (
        "gmc_cuda's compiled extension cannot be used here:\n"
        f"    built for  {describe(built)}\n"
        f"    you have   {describe(here)}\n"
        f"Build it again:\n    {command}"
    )


def load():
    """Imports gmc_cuda._C; ImportError, with the way out, where that cannot work."""
    record, here, command = read_record(), environment(), build_command()
    if record is not None and not fits(record, here):
        raise ImportError(explain(record, here, command))
    try:
        module = importlib.import_module("gmc_cuda._C")
    except ImportError as error:
        lost = isinstance(error, ModuleNotFoundError) and error.name == "gmc_cuda._C"
        reason = "" if lost else f"\n(the loader said: {error})"
        raise ImportError(explain(None if lost else record, here, command) + reason) from None
    own = module.build_config()  # the binary's own word, should the record belong to another one
    if not fits(own, here):
        raise ImportError(explain(own, here, command))
    return module, {**(record or {}), **own, **(record or {}), "with_cuda": own["with_cuda"]}


extension, build_config = load()
