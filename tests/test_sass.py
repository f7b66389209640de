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
    spilled = [int(nbytes) for nbytes in re.findall(r"(\d+) bytes spill stores", report)]
    assert spilled == [0] * {"look": 1, "repair": 2, "select": 7}[source]


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


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?(.*?)\s*;")


def kernels_of(source, arch, tmp_path):
    """The compiler's report, and each kernel's instructions, or None without a disassembler."""
    cubin = tmp_path / "cubin"
    report = compile_to(cubin, source, arch)
    if disassembler() is None:
        return report, None
    listings = disassembled(cubin).split("Function : ")[1:]
    return report, [INSTRUCTION.findall(listing) for listing in listings]


def registers(operands):
    return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}


def loads_in_flight(instructions, load=r"LDG?\.E"):
    """For each stretch without a branch or barrier: how many loads are issued before the first use.

    The use of a register that a load of the stretch has written, by anything, ends the count.
    """
    counts, loaded, count = [], set(), 0
    for instruction in [*instructions, "EXIT"]:
        name, _, operands = instruction.partition(" ")
        first, _, others = operands.partition(",")
        reads = registers(others) if not re.match(r"ST|RED|ATOM", name) else registers(operands)
        # Addresses are in the first operand of a store, and in the second of a load.
        if re.match(r"BRA|EXIT|BAR|BSSY|CALL|RET", name) or reads & loaded:
            counts.append(count)
            loaded, count = set(), 0
        if re.match(load, name):
            count += 1
            loaded |= registers(first)
    return counts


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_apply_has_four_parameters_on_their_way(arch, tmp_path):
    """Indices and values of four entries are asked for together, and then four parameters."""
    report, kernels = kernels_of("apply.cu", arch, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores" in report
    if kernels is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    found = [count for count in loads_in_flight(kernels[0]) if count >= 8]
    assert len(found) >= 2  # of the loops for three dtypes


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_merge_has_eight_entries_on_their_way(arch, tmp_path):
    """A thread asks for low byte, the one before and code of two entries of four payloads."""
    report, kernels = kernels_of("merge.cu", arch, tmp_path)
    spilled = [int(nbytes) for nbytes in re.findall(r"(\d+) bytes spill stores", report)]
    assert max(spilled) <= (4 if arch == "sm_80" else 0)  # in no loop over entries
    if kernels is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    assert len(kernels) == 5  # one for each wire type
    # Two groups of four payloads. A 4-bit code is shifted as soon as it is there.
    most = [sorted(loads_in_flight(kernel, r"LD\.E"))[-2:] for kernel in kernels]
    assert len([counts for counts in most if counts[0] >= 23]) == 4, most
    assert min(counts[0] for counts in most) >= 10, most


def test_the_aggregate_is_looked_up_beside_the_first_loads(machine_code):
    """What says where a tile's entries are is on its way with memory and gradient. Then a thread
    asks for indices and values of two entries."""
    if machine_code is None:
        pytest.skip("no cuobjdump (a toolkit's or triton's): PTX does not show the order")
    code = machine_code["GlobalMomentumILb0"]
    wait, first_round = code.index("ACQBULK"), code.index("BAR.RED")
    last = [match.end() for match in re.finditer(r"\bLDG\.E[.\w]*\.128", code[:wait])][-1]
    narrow = INSTRUCTION.findall(code[last:wait])
    assert {"LDG.E", "LDG.E.U16"} <= {instruction.split()[0] for instruction in narrow}
    assert max(loads_in_flight(INSTRUCTION.findall(code[wait:first_round]))) == 4


def test_uses_of_loads_are_seen():
    loads = ["LDG.E R4, desc[UR8][R2.64]", "LDG.E.U8 R5, desc[UR8][R2.64+0x1]"]
    assert loads_in_flight([*loads, "IADD3 R6, R4, R5, RZ", *loads]) == [2, 2]
    assert loads_in_flight([loads[0], "IADD3 R6, R4, 0x1, RZ", loads[1]]) == [1, 1]
    assert loads_in_flight([loads[0], "STG.E desc[UR8][R4.64], R9", loads[1]]) == [1, 1]
    assert loads_in_flight([loads[0], "BRA 0x80", loads[1]]) == [1, 1]
