"""The whole package on the emulator: its operators, whose CUDA kernels run on the CPU.

A copy of the repository gets another gmc_cuda/_ops.so, made of csrc/torch and of the kernels of
csrc/cuda, which are registered for CPU tensors. The package takes the CPU for a device there that
tells errors late, as a GPU does. Nothing else differs, so every test and program that is started
there runs on the kernels, through the entry points that users call.

    PYTHONPATH=tests python -m emulator.whole_library tests/test_ops.py -k merge   (as pytest)
"""

import importlib
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from emulator.compilation import CUDA_SOURCES, HERE, build_library
from emulator.kernel_ops import SMALL
from emulator.program import with_kernel_names

ROOT = HERE.parents[1]
PARTS = ("benchmarks", "examples", "gmc_cuda", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "build", "results", "_ops.so")


@cache
def library():
    """The library of operators, compiled on first use."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        oldest = importlib.import_module("compile").TARGET_TORCH.split(".")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    target = int(oldest[0]) << 56 | int(oldest[1]) << 48
    folder = Path(torch.__file__).parent
    return build_library(
        sorted((CUDA_SOURCES / "cuda").glob("*.cu")),
        [*(CUDA_SOURCES / "torch" / name for name in ("ops.cpp", "checks.cpp")),
         HERE / "whole_library.cpp"],
        ["-std=c++20", f"-DTORCH_TARGET_VERSION={target:#x}", "-DGMC_WITH_CUDA", "-DGMC_EMULATED",
         "-isystem", str(folder / "include")],
        [f"-L{folder / 'lib'}", "-Wl,--no-as-needed", "-lstdc++", "-ltorch", "-ltorch_cpu"],
        defines=[f"{name}={value}" for name, value in SMALL.items() if name != "GMC_LARGEST_COUNT"],
        include=[CUDA_SOURCES],
    )  # fmt: skip


def copy_repository(folder):
    """Copies what tests and programs need into `folder`, with the emulated operators."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / part, folder)
    shutil.copy(library(), folder / "gmc_cuda" / "_ops.so")
    device = folder / "gmc_cuda" / "_engine" / "device.py"
    found, on_a_gpu = (
        'SYNCHRONOUS = frozenset({"cpu"})',
        "SYNCHRONOUS: frozenset[str] = frozenset()",
    )
    text = device.read_text()
    assert found in text
    device.write_text(text.replace(found, on_a_gpu))


def pytest_there(folder, *arguments):
    """Runs pytest in such a copy; returns its exit status and what it printed."""
    # A fault ends the process: its report must not be lost in what pytest captures.
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, with_kernel_names(done.stdout, library())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        status, output = pytest_there(folder, *sys.argv[1:])
    print(output, end="")
    raise SystemExit(status)
