"""The compiler's report on the pass for sm_90: no spills, no stack frame, 16-byte loads and stores.

Reads what costs no GPU. Compiles csrc/cuda/pass.cu as setup.py does; needs nvcc, and a disassembler
(the toolkit's, or the one in triton's wheel) for machine code. Without one, PTX says less.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASS = ROOT / "csrc" / "cuda" / "pass.cu"
KERNELS = {
    # mangled part of the name: 16-byte loads of float32 inputs per thread, and stores
    "GlobalMomentumILb0": (8, 4),
    "GlobalMomentumILb1": (12, 4),
    "LocalMomentumILb0": (12, 8),
    "LocalMomentumILb1": (16, 8),
}


@cache
def nvcc():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from find_cuda import find_toolkits
    finally:
        sys.path.remove(str(ROOT / "tools"))
    found = find_toolkits(os.environ)
    return found[0].nvcc if found else None


def compile_to(cubin, source, arch, *options):
    """The compiler's report on a file of csrc/cuda."""
    if nvcc() is None:
        pytest.skip("no nvcc: the compiler's report cannot be read")
    command = [nvcc(), "-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    command += [f"-arch={arch}", "-cubin", "-o", cubin, *options, PASS.with_name(source)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@cache
def disassembler():
    """cuobjdump, or None."""
    candidates = [shutil.which("cuobjdump")]
    if nvcc():
        candidates.append(str(nvcc().with_name("cuobjdump")))
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        candidates.append(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and Path(path).exists()), None)


def disassembled(cubin):
    command = [disassembler(), "--dump-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


pytestmark = pytest.mark.slow  # nvcc compiles for three architectures


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """arch -> (the compiler's report, the folder with pass.cubin and pass.ptx); each once."""

    @cache
    def compile_for(arch):
        out = tmp_path_factory.mktemp(arch)
        return compile_to(out / "pass.cubin", PASS.name, arch, "--keep", "--keep-dir", out), out

    return compile_for


@pytest.fixture(scope="module")
def machine_code(compiled):
    """Each kernel's machine code for sm_90, or None without a disassembler."""
    if disassembler() is None:
        return None
    return by_kernel(disassembled(compiled("sm_90")[1] / "pass.cubin"), r"Function : ")


def by_kernel(listing, begin):
    """The part of a listing that belongs to each kernel of KERNELS."""
    parts = re.split(begin, listing)[1:]
    found = {name: part for part in parts for name in KERNELS if name in part.split("\n")[0]}
    assert found.keys() == KERNELS.keys()
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_no_spills_and_no_stack(arch, compiled):
    for name, part in by_kernel(compiled(arch)[0], r"Compiling entry function ").items():
        match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        assert match, f"{name}: no report"
        assert match.groups() == ("0", "0", "0"), f"{name}: {match[0]}"


@pytest.mark.parametrize("name", KERNELS)
def test_wide_loads_and_stores(name, compiled, machine_code):
    loads, stores = KERNELS[name]
    if machine_code:
        code = machine_code[name]
        patterns = r"\bLDG\.E[.\w]*\.128", r"\bSTG\.E[.\w]*\.128"
        assert not re.search(r"\b(LDL|STL)\b", code)
    else:
        listing = (compiled("sm_90")[1] / "pass.ptx").read_text()
        code = by_kernel(listing, r"\.entry ")[name]
        patterns = r"ld\.global[.\w]*\.v4", r"st\.global[.\w]*\.v4"
    assert len(re.findall(patterns[0], code)) >= loads
    assert len(re.findall(patterns[1], code)) >= stores


@pytest.mark.parametrize("source", ["look", "repair", "select"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_no_spills_in_the_rest_of_compress(arch, source, tmp_path):
    report = compile_to(tmp_path / "cubin", f"{source}.cu", arch)
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report)
    assert len(reports) == {"look": 1, "repair": 2, "select": 7}[source]
    assert set(reports) == {("0", "0")}


@pytest.mark.parametrize("name", KERNELS)
def test_the_pass_waits_behind_its_loads(name, machine_code):
    """It lets the next kernel start at once, and waits for the guess with its loads under way."""
    if machine_code is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    code = machine_code[name]
    loads = [match.start() for match in re.finditer(r"\bLDG\.E[.\w]*\.128", code)]
    (start,), (wait,) = (
        [match.start() for match in re.finditer(word, code)] for word in ("PREEXIT", "ACQBULK")
    )
    of_memory_and_gradient = loads[: KERNELS[name][0] - 4 * ("ILb1" in name)]
    assert start < loads[0]
    assert of_memory_and_gradient[-1] < wait < code.index("ATOMG")


def test_all_loads_before_the_first_use(machine_code):
    """Memory's and the gradient's four loads each are issued back to back."""
    if machine_code is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    code = machine_code["GlobalMomentumILb0"]
    lines = [line for line in code.split("\n") if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    places = [i for i, line in enumerate(lines) if re.search(r"\bLDG\.E[.\w]*\.128", line)]
    memory, gradient = places[:4], places[4:8]
    for run in (memory, gradient):
        assert run == list(range(run[0], run[0] + 4))
    loaded = {
        int(register) + i
        for place in memory
        for register in re.findall(r"\.128 R(\d+),", lines[place])
        for i in range(4)
    }
    between = lines[memory[-1] + 1 : gradient[0]]
    arithmetic = [line for line in between if re.search(r"\bF(ADD|MUL|FMA)\b", line)]
    used = {int(r) for line in arithmetic for r in re.findall(r"\bR(\d+)\b", line)}
    assert not used & loaded, "memory is waited for before the gradient is asked for"


def report_and_order(source, arch, tmp_path):
    """The compiler's report, and each kernel's global loads (L) among branches and stores (B)."""
    cubin = tmp_path / "cubin"
    report = compile_to(cubin, source, arch)
    if disassembler() is None:
        return report, None
    listing = disassembled(cubin)
    pattern = r"\b(?:(LDG?\.E)|BRA|STG?\.E)\b"
    return report, [
        "".join("L" if load else "B" for load in re.findall(pattern, kernel))
        for kernel in listing.split("Function : ")[1:]
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_apply_has_four_parameters_on_their_way(arch, tmp_path):
    """Indices, values and parameters of four entries are asked for before the first branch."""
    report, order = report_and_order("apply.cu", arch, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores" in report
    if order is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    assert len(re.findall("L{12,}", order[0])) == 3  # one loop for each dtype


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_merge_has_all_ranks_entries_on_their_way(arch, tmp_path):
    """Low byte and code of two entries of eight ranks (four with 32-bit codes)."""
    report, order = report_and_order("merge.cu", arch, tmp_path)
    spilled = [int(nbytes) for nbytes in re.findall(r"(\d+) bytes spill stores", report)]
    # On sm_100 what the call that opens a tile would overwrite; in no loop over entries.
    assert max(spilled) <= (8 if arch == "sm_100" else 0)
    if order is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    kernels = [kernel for kernel in order if "L" * 16 in kernel]
    assert len(kernels) == 5  # one for each wire type
    # Once to check the entries, once for more ranks than are held at a time.
    twice = [len(re.findall("L{32,}", kernel)) == 2 for kernel in kernels]
    assert sorted(twice) == [False, True, True, True, True]
