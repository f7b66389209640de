"""Where the programs are that come with CUDA: on PATH, or in a toolkit that PATH does not name."""

import shutil
from pathlib import Path

FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda-*/bin", "/opt/cuda/bin",
           "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/nsight-compute/*")  # fmt: skip


def find(program: str) -> str | None:
    """The path of a program, of the newest toolkit that has it; None if it is nowhere."""
    found = shutil.which(program)
    if found or "/" in program:
        return found
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    for pattern in FOLDERS:
        folders += sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    for folder in folders:
        if found := shutil.which(program, path=str(folder)):
            return found
    return None
