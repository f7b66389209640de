"""The peer made of cub::DeviceTopK: cub_topk.cu, built at first use as a plain shared library.

`python -m benchmarks.ops.cub_topk 9.0` builds it beforehand for that compute capability.

It needs nvcc and the headers of CCCL 3.2 or later: those of pip's nvidia-cuda-cccl, or the
toolkit's own where it is new enough.
"""

import ctypes
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# tools/ is no package, because setup.py imports from it before anything is installed.
sys.path.append(str(ROOT / "tools"))
from find_cuda import find_toolkits  # noqa: E402

NAME = "cub::DeviceTopK"
SOURCE = Path(__file__).with_name("cub_topk.cu")
BUILDS = ROOT / "build"
HEADER = Path("cub", "device", "device_topk.cuh")
BUILD_SECONDS = 120


def missing(device: torch.device) -> str:
    """Why it cannot run on this device, in one line; "" if it can."""
    if device.type != "cuda":
        return "needs a GPU"
    try:
        _library(*torch.cuda.get_device_capability(device))
    except OSError as error:
        return str(error).splitlines()[0]
    return ""


def headers(search_path: list[str] = sys.path) -> Path | None:
    """The folder of the CCCL headers that have DeviceTopK, pip's first."""
    folders = []
    for entry in search_path:
        folders += sorted(Path(entry or ".").glob("nvidia/*/include"), reverse=True)
    folders += [toolkit.include for toolkit in find_toolkits({})]
    for folder in folders:
        for candidate in (folder / "cccl", folder):
            if (candidate / HEADER).exists():
                return candidate
    return None


def build(target: Path, archs: list[str]) -> None:
    """Compiles for GPUs of these kinds ("90"). Raises OSError with the reason in its first line."""
    toolkits, include = find_toolkits({}), headers()
    if not toolkits:
        raise OSError("no CUDA toolkit (nvcc) found")
    if include is None:
        raise OSError(
            "no CCCL 3.2 headers (cub/device/device_topk.cuh): pip install nvidia-cuda-cccl"
        )
    command = [str(toolkits[0].nvcc), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-I", str(include), str(SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"compiling took longer than {BUILD_SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        first = next((line for line in lines if "error" in line), "nvcc failed")
        raise OSError(f"could not be compiled: {first}")


def built(arch: str) -> Path:
    """The library for GPUs of this kind ("90"), built if it is not there. Raises OSError."""
    target = BUILDS / f"libcub_topk-sm_{arch}.so"
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            build(made, [arch])
            made.rename(target)  # whole, or not at all
    return target


@functools.cache
def _library(major: int, minor: int) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built(f"{major}{minor}")))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.cub_topk_workspace.argtypes = [number, number, ctypes.POINTER(ctypes.c_size_t)]
    library.cub_topk_compress.argtypes = [
        pointer, pointer, ctypes.c_int, pointer, ctypes.c_float, number, number,
        pointer, ctypes.c_size_t, pointer, pointer, pointer, pointer,
    ]  # fmt: skip
    return library


class Selection:
    """Buffers for one size; calling it compresses on the current stream."""

    def __init__(self, numel: int, k: int, device: torch.device) -> None:
        self.library = _library(*torch.cuda.get_device_capability(device))
        self.numel, self.k = numel, k
        nbytes = ctypes.c_size_t()
        _check(self.library.cub_topk_workspace(numel, k, ctypes.byref(nbytes)))
        self.workspace = torch.empty(max(1, nbytes.value), dtype=torch.uint8, device=device)
        self.keys, self.indices = (
            torch.empty(k, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.values = torch.empty(k, dtype=torch.bfloat16, device=device)

    def __call__(self, memory: Tensor, grad: Tensor, dense: Tensor, momentum: float) -> None:
        _check(
            self.library.cub_topk_compress(
                memory.data_ptr(),
                grad.data_ptr(),
                grad.dtype is torch.bfloat16,
                dense.data_ptr(),
                momentum,
                self.numel,
                self.k,
                self.workspace.data_ptr(),
                self.workspace.numel(),
                self.keys.data_ptr(),
                self.indices.data_ptr(),
                self.values.data_ptr(),
                torch.cuda.current_stream(memory.device).cuda_stream,
            )
        )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cub::DeviceTopK: CUDA error {status}")


if __name__ == "__main__":
    try:
        print(built(sys.argv[1].replace(".", "")))
    except OSError as error:
        sys.exit(str(error))
