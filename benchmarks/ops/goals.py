"""The numbers to reach, next to what was measured: met, missed or not measured."""

from collections.abc import Callable

from benchmarks.ops.cases import TORCH_DTYPES
from gmc_cuda import ops
from gmc_cuda._engine import budget

CENTRE = {
    "density": 0.01,
    "grad_dtype": "fp32",
    "wire": "bf16",
    "ranks": 8,
    "method": "gmc",
    "exchange": "all_gather",
    "data": "gaussian",
}
CUDA_FLOOR = {25_600_000: 1.3, 124_000_000: 1.15, 10**9: 1.10}  # times a copy of the same bytes
TORCH_PEERS, TORCH_TIMES = ("eager topk", "compiled topk", "sampled threshold (DGC)"), 8
CUB, CUB_TIMES = "cub::DeviceTopK", 2.5
CPU_NUMEL, CPU_COMPRESS, CPU_STEP = 25_000_000, 1.5, 1.6
CUDA_STEP = {"all_gather": 0.95, "reduce_scatter": 0.8}
CUDA_STEP_NUMEL = 124_000_000
WIRE_NUMEL = 10**8
WIRE = {"bf16": {0.01: 3.2, 0.001: 3.75}, "fp8": {0.01: 2.2, 0.001: 2.75},
        "fp4": {0.01: 1.7, 0.001: 2.25}}  # fmt: skip

Row = dict[str, str]


def for_kernels(records: list[dict], device: str) -> list[Row]:
    found = {r["numel"]: r for r in records if r["op"] == "compress" and _is_centre(r)}
    rows = []
    for numel, limit in CUDA_FLOOR.items():
        row = f"compress, GPU, {_size(numel)}: time over a copy of 12 B per element"
        measured = found[numel]["times_of_copy"] if device == "cuda" and numel in found else None
        rows.append(_at_most(row, limit, measured, _why(device, "cuda")))
    for names, times, title in (
        (TORCH_PEERS, TORCH_TIMES, "best torch peer"),
        ((CUB,), CUB_TIMES, CUB),
    ):
        # Sizes at which a launch costs more than a pass are in the file, and not a goal.
        sizes = [n for n in found if n >= min(CUDA_FLOOR)] if device == "cuda" else []
        for numel in sizes or [None]:
            row = f"compress, GPU: {title} takes this many times longer"
            times_slower = []
            if numel:
                row = f"compress, GPU, {_size(numel)}: {title} takes this many times longer"
                peers = [p for p in found[numel]["peers"] if p["name"] in names]
                times_slower = [p["times_slower"]["median"] for p in peers if "times_slower" in p]
            measured = min(times_slower, default=None)
            rows.append(_at_least(row, times, measured, _why(device, "cuda")))
    row = f"compress, CPU, {_size(CPU_NUMEL)}: time over memory.add_(grad)"
    here = found.get(CPU_NUMEL) if device == "cpu" else None
    measured = here["reference"]["ratio"]["median"] if here else None
    rows.append(_at_most(row, CPU_COMPRESS, measured, _why(device, "cpu")))
    for name, density in ((wire_type, d) for wire_type in WIRE for d in WIRE[wire_type]):
        k = budget.entries_at(density, WIRE_NUMEL)
        row = f"wire, {name}, {100 * density:g} %, {_size(WIRE_NUMEL)}: bytes per selected entry"
        measured = ops.payload_nbytes(WIRE_NUMEL, k, TORCH_DTYPES[name]) / k
        rows.append(_at_most(row, WIRE[name][density], measured, "", unit=""))
    return rows


def for_step(records: list[dict], device: str) -> list[Row]:
    rows = []
    for exchange, limit in CUDA_STEP.items():
        found = _centre_steps(records, exchange)
        sizes = [n for n in found if n >= CUDA_STEP_NUMEL] if device == "cuda" else []
        for numel in sizes or [CUDA_STEP_NUMEL]:
            row = f"whole local step, GPU, {exchange}, {_size(numel)}: time over fused SGD"
            measured = found[numel]["reference"]["ratio"]["median"] if sizes else None
            rows.append(_at_most(row, limit, measured, _why(device, "cuda")))
    found = _centre_steps(records, "all_gather")
    row = f"whole local step, CPU, {_size(CPU_NUMEL)}: time over fused SGD"
    here = found.get(CPU_NUMEL) if device == "cpu" else None
    measured = here["reference"]["ratio"]["median"] if here else None
    rows.append(_at_most(row, CPU_STEP, measured, _why(device, "cpu")))
    return rows


def _centre_steps(records: list[dict], exchange: str) -> dict[int, dict]:
    steps = [r for r in records if r["op"] == "step" and r["exchange"] == exchange]
    return {r["numel"]: r for r in steps if _is_centre({**r, "exchange": CENTRE["exchange"]})}


def _is_centre(record: dict) -> bool:
    return all(record[name] == value for name, value in CENTRE.items())


def _why(device: str, wanted: str) -> str:
    if device == wanted:
        return "not measured: left out of this run"
    return "not measured: this run has no GPU" if wanted == "cuda" else "not measured: a GPU's run"


def _at_most(what: str, limit: float, measured: float | None, why: str, unit: str = "x") -> Row:
    return _row(what, f"{limit:g}{unit} or less", measured, lambda v: v <= limit, why, unit)


def _at_least(what: str, limit: float, measured: float | None, why: str) -> Row:
    return _row(what, f"{limit:g}x or more", measured, lambda v: v >= limit, why, "x")


def _row(
    what: str,
    goal: str,
    measured: float | None,
    reached: Callable[[float], bool],
    why: str,
    unit: str,
) -> Row:
    if measured is None:
        return {"what": what, "goal": goal, "measured": "", "outcome": why}
    outcome = "met" if reached(measured) else "missed"
    return {"what": what, "goal": goal, "measured": f"{measured:.3g}{unit}", "outcome": outcome}


def _size(numel: int) -> str:
    return f"{numel / 1e6:g}e6" if numel < 10**9 else f"{numel / 1e9:g}e9"
