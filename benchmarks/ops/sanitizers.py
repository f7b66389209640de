"""compute-sanitizer's four tools over the GPU tests that are small, all four at once.

racecheck and initcheck slow a kernel down a hundred times and more, hence a selection. Torch's own
kernels are not ours to check, and there are far more of them, so all tools but initcheck are told
to look at ours alone. initcheck must see them: what a kernel writes that it does not look at counts
as never written, and most of what ours read was written by torch's. It gets fewer tests for that.
"""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TextIO

from benchmarks.ops.tools import find

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = ["--kernel-name", "kns=gmc"]
OPTIONS = {
    "memcheck": [*OURS, "--leak-check", "no"],
    "racecheck": OURS,
    # An aggregate's gaps are never written, and copied with the rest when a test looks at it.
    "initcheck": ["--check-api-memory-access", "no"],
    "synccheck": OURS,
}
FOUND = 86  # compute-sanitizer's exit status when its tool found something
# Sizes up to 140,001 and all ops; graphs cannot be captured without torch's allocator.
EQUAL = "equals_cpu and not at_size"
SELECTION = f"{EQUAL} or damaged_payloads or comes_of_the_guess or one_chain"
FEWER = "everything_else and 900 or comes_of_the_guess or one_chain and 70000"


def run(python: str, root: Path, log: TextIO, seconds: float) -> dict[str, str]:
    """By tool, "passed" or what went wrong in one line."""
    program = find("compute-sanitizer")
    if program is None:
        missing = "not run: compute-sanitizer is not on PATH, nor beside nvcc"
        return dict.fromkeys(TOOLS, missing)
    # Each tensor from cudaMalloc: in torch's big blocks, an access beside a tensor is not noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running, results = {}, {}
    deadline = time.monotonic() + seconds
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS[tool]]
        command += [python, "-m", "pytest", "-m", "gpu", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["tests/test_cuda.py", "-k", FEWER if tool == "initcheck" else SELECTION]
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when its tool has ended
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        running[tool] = process, output
    for tool, (process, output) in running.items():
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = None
        output.seek(0)
        said = output.read()
        output.close()
        log.write(f"\n===== compute-sanitizer {tool}: exit status {status}\n{said}\n")
        results[tool] = verdict(status, said, seconds)
    return results


def verdict(status: int | None, said: str, seconds: float) -> str:
    if status is None:
        return f"not finished in {seconds:.0f} s"
    if "Device not supported" in said:
        return "not run: compute-sanitizer does not support this machine (Device not supported)"
    counted = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    errors = int(counted[1] or counted[2]) if counted else None
    passed = re.search(r"(\d+) passed", said)
    if status == 0 and errors == 0 and passed:
        return "passed"
    if errors:
        return f"{errors} errors (see the log)"
    return f"failed with exit status {status}: the tests themselves, or no summary (see the log)"
