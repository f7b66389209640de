#!/usr/bin/env python3
"""Everything that needs a GPU, in one command of less than 8 minutes: `make gpu RESULTS=folder`.

Builds for this machine's GPU, runs the GPU tests, compute-sanitizer's four tools, the kernel and
step benchmarks, and a short training run over NCCL. Each part has its share of the time, and a part
that fails does not stop the others. Needs nothing but Python's standard library itself.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

from bench import sanitizers

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"build": 130, "tests": 80, "sanitizers": 90, "kernels": 110, "step": 30, "training": 35}
FEW = ["--device", "cuda", "--quick", "--seconds", "1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="Python of the environment")
    parser.add_argument("--build", default="", metavar="COMMAND", help="what builds the extension")
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER")
    options = parser.parse_args()

    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"make gpu: {gpu}", file=sys.stderr)
        return 1
    name, capability = gpu
    folder = Path(options.results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}, compute capability {capability}", flush=True)
    started = time.monotonic()
    path = folder / f"gpu-{date.today().isoformat()}.log"
    with path.open("w") as log:
        parts = run_parts(options, folder, capability, log)
    print_summary(parts, name, time.monotonic() - started)
    print(f"everything they printed: {path.name} in {options.results}")
    return 1 if any(outcome != "passed" for _, outcome, _ in parts) else 0


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


def run_parts(options, folder: Path, capability: str, log) -> list[tuple[str, str, float]]:
    """Name, outcome and seconds of each part; an outcome other than "passed" says what happened."""
    python = options.python
    environment = {
        **os.environ,
        "FORCE_CUDA": "1",
        # For this GPU alone: a third of the time that all of them take.
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability,
        "PYTHONUNBUFFERED": "1",
    }
    commands = {
        "build": shlex.split(options.build),
        "tests": [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        "sanitizers": None,
        # The limits leave room for the last case, so that there is a file in any event.
        "kernels": [python, "benchmarks/kernels.py", *FEW, "--limit", "85",
                    "--output", str(folder)],
        "step": [python, "benchmarks/step.py", *FEW, "--limit", "18", "--output", str(folder)],
        "training": [python, "examples/compare_methods", "--device", "cuda", "--workers", "1",
                     "--steps", "60", "--output", str(folder)],
    }  # fmt: skip
    parts = []
    for name, seconds in SECONDS.items():
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        if name == "sanitizers":
            for tool, outcome in sanitizers.run(python, ROOT, log, seconds).items():
                print(f"{tool}: {outcome}", flush=True)
                parts.append((f"sanitizer {tool}", outcome, time.monotonic() - began))
            continue
        if not commands[name]:
            print("no --build was given: using what is there", flush=True)
            continue
        status, last = run(commands[name], environment, log, seconds)
        outcome = "passed" if status == 0 else f"failed: {last}"
        if name == "tests" and status == 0 and " passed" not in last:
            outcome = f"failed: none ran: {last}"
        if status is None:
            outcome = f"not finished in {seconds} s"
        parts.append((name, outcome, time.monotonic() - began))
        if name == "build" and outcome != "passed":
            # Whatever was built before is not what would be measured.
            others = [other for other in SECONDS if other != "build"]
            return parts + [(other, "not run: the build did not pass", 0.0) for other in others]
    return parts


def run(command: list[str], environment: dict, log, seconds: float) -> tuple[int | None, str]:
    """Exit status (None: stopped, it took too long) and the last line printed."""
    log.write(f"\n===== {' '.join(Path(word).name for word in command[:2])}\n")
    log.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    last, late = "", False

    def stop() -> None:
        nonlocal late
        late = True
        os.killpg(process.pid, 9)

    timer = threading.Timer(seconds, stop)
    timer.start()
    for line in process.stdout:
        log.write(line)
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    timer.cancel()
    return (None if late else status), last[:200]


def print_summary(parts: list[tuple[str, str, float]], gpu: str, took: float) -> None:
    print(f"\n{gpu}: {took:.0f} s in all")
    width = max(len(name) for name, _, _ in parts)
    for name, outcome, seconds in parts:
        print(f"  {name:<{width}}  {seconds:4.0f} s  {outcome}")
    failed = [name for name, outcome, _ in parts if outcome != "passed"]
    print(f"not passed: {', '.join(failed)}" if failed else "all parts passed")


if __name__ == "__main__":
    sys.exit(main())
