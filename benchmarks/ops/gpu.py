#!/usr/bin/env python3
"""Everything that needs a GPU, in one command: `make gpu RESULTS=folder`, in less than 10 minutes.

Builds for this machine's GPU, then what matters most comes first: a look at whether the kernels are
right, the times of the ops and of the step at the middle size, all GPU tests, hardware counters of
one step, all sizes beside peers, compute-sanitizer's four tools, a training run. Each part has its
share of the time; one that fails or hangs does not stop the others. What they printed and how they
ended is written as they go, so a run that is cut off leaves all there was. --quick makes the build,
the times of ops and step, and the tests that take no time: 3 minutes. --only names parts.

Needs nothing but Python's standard library itself; what it starts needs torch, pytest and
hypothesis.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TextIO

from benchmarks.ops import sanitizers
from benchmarks.ops.tools import find

ROOT = Path(__file__).resolve().parents[2]
CUDA = ["--device", "cuda", "--quick", "--seconds", "1"]
MIDDLE = ["--numel", "124e6", "--no-peers"]
SLOW = "largest_bucket or at_size or nccl or early_starts"  # tests that --quick leaves out
# On a machine without a network pip would ask for minutes for a package that is not there.
HURRIED = {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "5"}


@dataclass
class Part:
    """A part of the run: its command, or None for the sanitizers; and how it ended."""

    name: str
    seconds: float  # its share
    command: list[str] | None
    outcome: str = "not begun"
    took: float = 0.0

    def ends(self, outcome: str, began: float) -> None:
        self.outcome, self.took = outcome, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="Python of the environment")
    parser.add_argument("--build", default="", metavar="COMMAND", help="what builds the extension")
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="what matters most, in 3 minutes")
    parser.add_argument(
        "--only",
        metavar="PART,PART",
        type=lambda text: text.split(","),
        default=[],
        help="these parts, after the build; in the order in which they are always run",
    )
    parser.add_argument(
        "--share", type=share, action="append", default=[], metavar="PART=SECONDS",
        help="another share of the time for a part",
    )  # fmt: skip
    options = parser.parse_args()

    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"make gpu: {gpu}", file=sys.stderr)
        return 1
    name, capability = gpu
    folder = Path(options.results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = plan(options, folder)
    known = {part.name for part in parts}
    for option, names in (
        ("--share", [name for name, _ in options.share]),
        ("--only", options.only),
    ):
        if set(names) - known:
            unknown = ", ".join(sorted(set(names) - known))
            parser.error(f"{option}: got {unknown}, must be a part of this run")
    if options.only:
        parts = [part for part in parts if part.name in {"build", "import", *options.only}]
    title = f"{name}, compute capability {capability}"
    print(f"{title}\n" + ", ".join(f"{p.name} {p.seconds:g} s" for p in parts), flush=True)
    stem = folder / f"gpu-{date.today().isoformat()}"
    with stem.with_suffix(".log").open("w") as log:
        run_parts(parts, options.python, capability, log, lambda: summarise(parts, title, stem))
    print(f"\n{summarise(parts, title, stem)}\neverything they printed: {stem.name}.log")
    return 1 if any(part.outcome != "passed" for part in parts) else 0


def share(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    return name, float(seconds)


def find_gpu() -> tuple[str, str] | str:
    """The first GPU's name and compute capability, or why there is none."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "there is no GPU on this machine (no nvidia-smi)"
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    lines = [line for line in done.stdout.splitlines() if "," in line]
    if done.returncode or not lines:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nvidia-smi lists none"]
        return f"there is no GPU on this machine ({said[0]})"
    name, capability = lines[0].rsplit(",", 1)
    return name.strip(), capability.strip()


def plan(options: argparse.Namespace, folder: Path) -> list[Part]:
    """The parts in order. Limits within a command leave it room for its last case."""
    python, output = options.python, ["--output", str(folder)]
    # A file that cannot be imported here, because a package is missing, stops no other.
    pytest = [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
              "--continue-on-collection-errors"]  # fmt: skip
    kernels, step, host, counted = (
        [python, "-m", f"benchmarks.ops.{name}"] for name in ("kernels", "step", "host", "counted")
    )
    # Kernels are measured with what the kernels before them left in the cache, as in a step.
    ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none",
           "--cache-control", "none", "--section", "SpeedOfLight",
           "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy",
           "--section", "LaunchStats",
           "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,smsp__inst_executed.sum",
           "-f", "--log-file", f"{folder}/ncu-{date.today().isoformat()}.txt"]  # fmt: skip
    first_use = [python, "-c", "import torch; print(torch.zeros(1).cuda() + 1, torch.__version__)"]
    build = Part("build", 80, shlex.split(options.build))
    # On a new machine torch's files are in no cache: what is started next would pay for it.
    wake = Part("import", 40, first_use)
    if options.quick:
        parts = [
            replace(build, seconds=55),
            replace(wake, seconds=30),
            Part("kernels", 25, [*kernels, *CUDA, *MIDDLE, "--limit", "12", *output]),
            Part("step", 20, [*step, *CUDA, *MIDDLE, "--limit", "8", *output]),
            Part("tests", 50, [*pytest, "-k", f"not ({SLOW})"]),
        ]
    else:
        parts = [
            build,
            wake,
            Part("smoke", 20, [*pytest, "-x", "tests/test_cuda.py",
                               "-k", sanitizers.EQUAL]),
            Part("kernels", 40, [*kernels, *CUDA, *MIDDLE, "--limit", "25", *output]),
            Part("step", 25, [*step, *CUDA, *MIDDLE, "--limit", "15", *output]),
            Part("host", 20, [*host, *output]),
            Part("tests", 120, pytest),
            Part("counters", 35, [*ncu, *counted]),
            # In a folder of its own, because kernels has written files of the same names.
            Part("sizes", 60, [*kernels, *CUDA, "--limit", "40", "--output", f"{folder}/sizes"]),
            Part("sanitizers", 110, None),
            Part("training", 30, [python, "-m", "torch.distributed.run", "--standalone",
                                  "--nproc-per-node", "1", "examples/minimal.py"]),
        ]  # fmt: skip
    shares = dict(options.share)
    return [replace(part, seconds=shares.get(part.name, part.seconds)) for part in parts]


def run_parts(
    parts: list[Part], python: str, capability: str, log: TextIO, report: Callable[[], object]
) -> None:
    """Runs one after the other; report() after each."""
    environment = {
        **os.environ,
        **HURRIED,
        "FORCE_CUDA": "1",
        # For this GPU alone: a third of the time that all of them take.
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability,
        "PYTHONUNBUFFERED": "1",
    }
    for number, part in enumerate(parts):
        began = time.monotonic()
        print(f"\n== {part.name}", flush=True)
        part.ends(run_part(part, python, environment, log), began)
        if part.name == "build" and part.outcome != "passed":
            # Whatever was built before is not what would be measured.
            for other in parts[number + 1 :]:
                other.outcome = "not run: the build did not pass"
        report()
        if parts[-1].outcome.startswith("not run: the build"):
            return
        if part.name == "build":  # a peer's extension, while the tests run
            prebuild = [python, "-m", "benchmarks.ops.cub_topk", capability]
            arguments = prebuild, environment, log, 120
            threading.Thread(target=run, args=arguments, daemon=True).start()


def run_part(part: Part, python: str, environment: dict, log: TextIO) -> str:
    if part.command is None:
        outcomes = sanitizers.run(python, ROOT, log, part.seconds)
        for tool, outcome in outcomes.items():
            print(f"{tool}: {outcome}", flush=True)
        bad = [f"{tool} {outcome}" for tool, outcome in outcomes.items() if outcome != "passed"]
        return "; ".join(bad) or "passed"
    if not part.command:
        print("no --build was given: using what is there", flush=True)
        return "passed"
    program, *arguments = part.command
    found = find(program)
    if found is None:
        return f"not run: {program} is not on PATH, nor beside nvcc"
    status, last = run([found, *arguments], environment, log, part.seconds)
    if status is None:
        return f"not finished in {part.seconds:g} s"
    if status != 0:
        return f"failed: {last}"
    if "pytest" in part.command and " passed" not in last:
        return f"failed: none ran: {last}"
    return "passed"


def run(
    command: list[str], environment: dict, log: TextIO, seconds: float
) -> tuple[int | None, str]:
    """Exit status (None: stopped, it took too long) and the last line printed."""
    log.write(f"\n===== {' '.join(Path(word).name for word in command[:2])}\n")
    log.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    last = ""

    def read() -> None:
        nonlocal last
        assert process.stdout is not None  # a pipe
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
            last = line.strip() or last

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # also what it left behind, which would hold the pipe open
    process.wait()
    reader.join(5)
    return status, last[:200]


def summarise(parts: list[Part], title: str, stem: Path) -> str:
    """Writes how the parts ended so far, and returns it."""
    width = max(len(part.name) for part in parts)
    lines = [f"{title}: {sum(part.took for part in parts):.0f} s"]
    lines += [
        f"  {p.name:<{width}}  {p.took:4.0f} of {p.seconds:3.0f} s  {p.outcome}" for p in parts
    ]
    failed = [part.name for part in parts if part.outcome != "passed"]
    lines.append(f"not passed: {', '.join(failed)}" if failed else "all parts passed")
    text = "\n".join(lines)
    stem.with_suffix(".txt").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
