"""What keeps one build working with every torch: which symbols and headers it uses."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import gmc_cuda
from gmc_cuda._engine import library

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = Path(gmc_cuda.__file__).with_name("_ops.so")
MODULE = Path(library.extension.__file__)

# Libraries of the system, and the C++ runtime, carry versions of their own.
VERSIONED = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
# The C interface of torch that its stable C++ headers are made of.
TORCH = re.compile(r"(aoti_torch|torch)_\w+$")
COMPILER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


def output(program, *arguments):
    if not shutil.which(program):
        pytest.skip(f"no {program} (binutils)")
    return subprocess.check_output([program, *map(str, arguments)], text=True)


def undefined(library):
    """(kind, name) of the symbols that a library takes from others; kind w may be missing."""
    return [line.split() for line in output("nm", "-D", "--undefined-only", library).splitlines()]


def needed(library):
    """The libraries that it names."""
    return set(re.findall(r"NEEDED.*\[(\S+?)\.so", output("readelf", "-d", library)))


def test_operators_use_torchs_stable_c_interface_alone():
    names = [name for _, name in undefined(OPERATORS)]
    others = {name for name in names if not VERSIONED.search(name)} - COMPILER
    assert not {name for name in others if not TORCH.match(name)}
    assert "torch_library_impl" in others  # the symbols of torch have been seen


def test_operators_load_where_torch_has_no_cuda():
    cuda = [(kind, name) for kind, name in undefined(OPERATORS) if "cuda_" in name]
    assert set(cuda) <= {("w", "aoti_torch_get_current_cuda_stream")}
    assert bool(cuda) == library.build_config["with_cuda"]


SYSTEM = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
LOADER = "ld-linux"


@pytest.mark.parametrize(
    ("library", "of_torch"), [(OPERATORS, {"libtorch", "libtorch_cpu"}), (MODULE, set())]
)
def test_libraries_needed(library, of_torch):
    found = {name for name in needed(library) if not name.startswith(LOADER)}
    assert found - SYSTEM == of_torch  # neither Python's, nor CUDA's, nor libc10


def test_the_module_knows_no_torch():
    assert not {name for _, name in undefined(MODULE) if re.search("torch|c10|2at", name)}


def test_nothing_of_ours_is_exported():
    names = output("nm", "-D", "--defined-only", OPERATORS)
    assert "gmc" not in names
    assert "cuda" not in names


def test_only_stable_headers_of_torch_are_included():
    stable = re.compile(r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
    included = {
        header
        for source in (ROOT / "csrc").rglob("*.*")
        for header in re.findall(r'#include [<"](\S+?)[>"]', source.read_text())
        if re.match("torch/|ATen/|c10/|caffe2/", header)
    }
    assert included
    assert not {header for header in included if not stable.match(header)}
