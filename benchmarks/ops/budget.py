"""Bytes that each op must move, each input read once and each output written once."""

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.problem import Problem
from benchmarks.ops.two_sided import TwoSided

ENTRY = 6  # an aggregate's entry: a 16-bit index and a float32
GPU_SECTOR, CPU_LINE = 32, 64


def compress(case: Case) -> int:
    """Memory and, for DGC, the momentum buffer read and written; the gradient read.

    12 B per element for GMC with float32 gradients. The aggregate and the payload are not
    counted, so that the ratio to a copy of these bytes is not flattered by them.
    """
    states = 2 if case.method == "dgc" else 1
    return (8 * states + case.dtype.itemsize) * case.numel


def merge(problem: Problem) -> int:
    return problem.merged.numel() + ENTRY * int(problem.touched().sum())


def apply(problem: Problem) -> int:
    """The aggregate, and the sectors (CPU: cache lines) of the parameters that hold an entry."""
    sector = GPU_SECTOR if problem.device.type == "cuda" else CPU_LINE
    width = sector // problem.case.dtype.itemsize
    touched = problem.touched()
    whole = touched.numel() // width * width
    sectors = int(touched[:whole].view(-1, width).any(1).sum()) + int(touched[whole:].any())
    return ENTRY * int(touched.sum()) + 2 * sector * sectors


def own(problem: TwoSided) -> int:
    """What arrives at an owner, and its owner memory read and written."""
    return problem.received.numel() + 8 * problem.width


def by_op(problem: Problem) -> dict[str, int]:
    """The bytes of each op of a round, in its order."""
    sizes = {"compress": compress(problem.case)}
    if isinstance(problem, TwoSided):
        sizes["own"] = own(problem)
    return {**sizes, "merge": merge(problem), "apply": apply(problem)}


def sgd(case: Case) -> int:
    """Fused SGD with momentum: parameter and momentum read and written, gradient read."""
    return 5 * case.dtype.itemsize * case.numel


def device_memory(case: Case, peers: bool) -> int:
    """What a case takes at most, to tell beforehand whether it fits."""
    gradient = case.dtype.itemsize
    elements = 4 + 4 * gradient + gradient  # memory, gradients, parameters
    elements += 4 if case.method == "dgc" else 0
    # the reference's memory; the peers' memory, dense aggregate, |v|, top-k's own; SGD's two
    elements += 4 + (24 if peers else 0) + 2 * gradient
    drawing = 12  # float32 before it is rounded; a shifted copy, a gradient of zeros
    sets = max(2, 32 // case.ranks)
    payloads = case.payload_nbytes * (case.ranks * sets + 2) + 2 * ENTRY * case.k * case.ranks
    if peers:  # the merge of unpacked payloads
        payloads += 12 * case.k * case.ranks
    return int((elements + drawing) * case.numel + payloads)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**63 - 1  # unknown: try
