"""A rehearsal of `make gpu` without a GPU: every way in which a part can end.

The tools and the Python that it starts are scripts in a folder of their own, which does as it is
told: pass, fail, hang, leave a process behind.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ops import sanitizers, tools

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["build", "import", "smoke", "kernels", "step", "host", "tests", "counters", "sizes"]
PARTS += ["sanitizers", "training"]

SMI = """#!/bin/sh
case "$SMI" in
  "") echo "NVIDIA Imagined, 9.0";;
  none) echo "No devices were found"; exit 6;;
  broken) echo "Failed to initialize NVML"; exit 9;;
esac
"""
# Finds out which part it is, and does what REHEARSE says of it: "part=what part=what".
PROGRAM = """#!/bin/sh
case "$0 $*" in
  *sanitizer*memcheck*) part=memcheck;;
  *sanitizer*racecheck*) part=racecheck;;
  *sanitizer*initcheck*) part=initcheck;;
  *sanitizer*) part=synccheck;;
  *ncu*) part=counters;;
  *cub_topk*) part=prebuild;;
  *build) part=build;;
  *"import torch"*) part=import;;
  *"-m pytest"*test_cuda.py*) part=smoke;;
  *"-m pytest"*) part=tests;;
  *kernels*numel*) part=kernels;;
  *kernels*) part=sizes;;
  *ops.step*) part=step;;
  *ops.host*) part=host;;
  *) part=training;;
esac
echo "$part: $*" >> "$CALLS"
echo "$part arch $TORCH_CUDA_ARCH_LIST cuda $FORCE_CUDA"
for told in $REHEARSE; do
  case "$told" in
    $part=fail) echo "it broke"; exit 3;;
    $part=hang) echo "working"; sleep 60;;
    $part=leaves) (sleep 60) & echo "1 passed"; exit 0;;
    $part=skips) echo "3 skipped"; exit 0;;
    $part=finds) echo "2 passed"; echo "ERROR SUMMARY: 4 errors"; exit 86;;
  esac
done
echo "========= ERROR SUMMARY: 0 errors"
echo "5 passed in 1s"
"""


@pytest.fixture
def rehearse(tmp_path):
    """Runs gpu.py among the imagined tools; returns what subprocess.run does, and the results."""
    tools, results, calls = tmp_path / "bin", tmp_path / "results", tmp_path / "calls"
    tools.mkdir()
    for name, text in (("nvidia-smi", SMI), ("python", PROGRAM), ("ncu", PROGRAM),
                       ("compute-sanitizer", PROGRAM)):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, told="", without=(), smi=""):
        for name in without:
            (tools / name).unlink()
        calls.write_text("")
        python = tools / "python"
        command = [sys.executable, "-m", "benchmarks.ops.gpu", "--python", python,
                   "--build", f"{python} build", "--results", results, *arguments]  # fmt: skip
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "REHEARSE": told, "SMI": smi,
                       "CALLS": str(calls), "HOME": os.environ.get("HOME", "")}  # fmt: skip
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        written = {path.suffix: path.read_text() for path in results.glob("gpu-*")}
        return done, written, calls.read_text()

    return run


def outcomes(written):
    """Part -> how it ended, from the summary."""
    lines = [line.split(None, 5) for line in written[".txt"].splitlines()[1:-1]]
    return {line[0]: line[5] for line in lines}


def test_all_parts_pass(rehearse):
    done, written, calls = rehearse()
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(written) == dict.fromkeys(PARTS, "passed")
    assert "all parts passed" in done.stdout
    assert done.stdout.startswith(
        "NVIDIA Imagined, compute capability 9.0\nbuild 80 s, import 40 s"
    )
    assert "build arch 9.0 cuda 1" in written[".log"]  # one architecture, and no build without CUDA
    said = [line.split(":")[0] for line in calls.splitlines()]
    assert [part for part in said if part in PARTS] == [p for p in PARTS if p != "sanitizers"]
    assert {"memcheck", "racecheck", "initcheck", "synccheck", "prebuild"} <= set(said)
    for line in calls.splitlines():
        if "check: " in line:  # torch's own kernels are left alone, but for what they have written
            assert ("--kernel-name kns=gmc" in line) != line.startswith("initcheck:")
    assert total_of_shares(done) < 600


def total_of_shares(done):
    told = done.stdout.splitlines()[1].split(", ")
    return sum(float(words.split()[-2]) for words in told)


def test_quick(rehearse):
    done, written, calls = rehearse("--quick")
    assert done.returncode == 0
    assert list(outcomes(written)) == ["build", "import", "kernels", "step", "tests"]
    assert "not (largest_bucket" in calls
    assert total_of_shares(done) <= 180


def test_parts_of_one_s_choice(rehearse):
    done, written, _ = rehearse("--only", "training,sizes")
    assert done.returncode == 0
    assert list(outcomes(written)) == ["build", "import", "sizes", "training"]


def test_what_is_measured_twice_is_in_two_folders(rehearse):
    """kernels and sizes write files of the same names."""
    _, _, calls = rehearse()
    outputs = [re.search(r"--output (\S+)", line)[1] for line in calls.splitlines()
               if "benchmarks.ops.kernels" in line]  # fmt: skip
    assert len(set(outputs)) == 2


def test_tools_that_are_not_on_path(monkeypatch, tmp_path):
    """PATH often has nvcc, or not even that, and the toolkit the rest."""
    for folder, program in (("cuda-13.0/bin", "ncu"), ("cuda-12.8/bin", "ncu"), ("here", "nvcc")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / program).write_text("")
        (tmp_path / folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "here"))
    monkeypatch.setattr(tools, "FOLDERS", (f"{tmp_path}/cuda-*/bin",))
    assert tools.find("ncu") == f"{tmp_path}/cuda-13.0/bin/ncu"
    assert tools.find("nvcc") == f"{tmp_path}/here/nvcc"
    assert tools.find("compute-sanitizer") is None
    assert tools.find(f"{tmp_path}/nowhere/ncu") is None


def test_parts_that_fail_hang_or_leave_something_behind_stop_no_other(rehearse):
    told = "smoke=fail kernels=hang step=leaves tests=skips training=fail"
    told += " memcheck=finds racecheck=hang"
    shares = ["--share", "kernels=1", "--share", "sanitizers=1"]
    done, written, _ = rehearse(*shares, told=told, without=["ncu"])
    assert done.returncode == 1
    assert outcomes(written) == {
        "build": "passed",
        "import": "passed",
        "smoke": "failed: it broke",
        "kernels": "not finished in 1 s",
        "step": "passed",
        "host": "passed",
        "tests": "failed: none ran: 3 skipped",
        "sizes": "passed",
        "sanitizers": "memcheck 4 errors (see the log); racecheck not finished in 1 s",
        "counters": "not run: ncu is not on PATH, nor beside nvcc",
        "training": "failed: it broke",
    }
    assert "working" in written[".log"]  # what it printed before it was stopped
    assert "not passed: smoke, kernels, tests, counters, sanitizers, training" in done.stdout


def test_without_a_build_nothing_is_measured(rehearse):
    done, written, calls = rehearse(told="build=fail")
    assert done.returncode == 1
    ended = outcomes(written)
    assert ended.pop("build") == "failed: it broke"
    assert set(ended.values()) == {"not run: the build did not pass"}
    assert len(ended) == 10
    assert calls.count("\n") == 1


def test_no_compute_sanitizer(rehearse):
    done, written, _ = rehearse(without=["compute-sanitizer"])
    assert done.returncode == 1
    assert "memcheck not run: compute-sanitizer is not on PATH" in outcomes(written)["sanitizers"]


def test_the_sanitizers_and_the_smoke_test_see_every_op():
    """By its name a test says that it is for them."""
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_cuda.py", "-k"]
    for selection in (sanitizers.EQUAL, sanitizers.SELECTION):
        found = subprocess.check_output([*collect, selection], cwd=ROOT, text=True)
        for op in ("compress", "dense_ops", "everything_else", "merge_ranges", "verdict_over_tags"):
            assert f"test_{op}_equals_cpu" in found


@pytest.mark.parametrize(
    ("smi", "words"),
    [("none", "there is no GPU on this machine (No devices"), ("broken", "(Failed to initialize")],
)
def test_no_gpu(rehearse, smi, words):
    done, written, calls = rehearse(smi=smi)
    assert done.returncode == 1
    assert words in done.stderr
    assert not written
    assert not calls


def test_unknown_share(rehearse):
    done, _, calls = rehearse("--share", "kernles=3")
    assert done.returncode == 2
    assert "--share: got kernles, must be a part" in done.stderr
    assert not calls
