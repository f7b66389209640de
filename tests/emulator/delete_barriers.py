"""Delete each barrier of csrc/cuda in turn and see whether the tests notice.

    python tests/emulator/delete_barriers.py [--only scan.cuh:40] [-- command ...]

For each __syncthreads...() and __syncwarp() in *.cu and *.cuh: copies csrc, deletes that one
barrier, and runs the command (default: pytest on this folder) with GMC_CUDA_SOURCES naming the
copy. Lists the barriers without which the command still succeeded and exits with 1 if there are
any. Takes as many test runs as there are barriers: run before a release, not in CI.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
BARRIER = re.compile(r"\b__sync(threads(_or|_and|_count)?|warp)\s*\(")
# These tests are about the executor, not about csrc.
OTHERS = ("test_executor.py", "test_early_starts.py", "test_delete_barriers.py")
IGNORED = [f"--ignore={HERE / name}" for name in OTHERS]
# What a thread knows without the others, in place of the value.
ALONE = {"_or": "(({}) != 0)", "_and": "(({}) != 0)", "_count": "int(({}) != 0)"}


def without_comments(text):
    """The text with comments and string literals blanked out, every character in its place."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\""
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def barriers(text):
    """(line, text without that barrier) for each barrier."""
    code = without_comments(text)
    for match in BARRIER.finditer(code):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        argument = text[match.end() : end - 1]
        value = ALONE.get(match[2], "((void)0)").format(argument)
        line = text.count("\n", 0, match.start()) + 1
        yield line, text[: match.start()] + value + text[end:]


def run(command, sources):
    """Whether the command succeeds on these sources; a run of over half an hour has not."""
    environment = {**os.environ, "GMC_CUDA_SOURCES": str(sources)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return False, "it hung"
    return done.returncode == 0, (done.stdout + done.stderr).strip().split("\n")[-1]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, default=CSRC, help="folder to copy (csrc)")
    parser.add_argument("--only", help="FILE or FILE:LINE, to try those barriers alone")
    parser.add_argument("command", nargs="*", help="what must fail; after --")
    options = parser.parse_args(arguments)
    command = options.command or [sys.executable, "-m", "pytest", "-x", "-q", str(HERE), *IGNORED]

    missed, tried = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "csrc"
        shutil.copytree(options.sources, copy)
        passed, last = run(command, copy)
        if not passed:
            sys.exit(f"the command fails with every barrier in place: {last}")
        for path in sorted([*copy.rglob("*.cu"), *copy.rglob("*.cuh")]):
            original = path.read_text()
            for line, changed in barriers(original):
                place = f"{path.relative_to(copy)}:{line}"
                if options.only and not re.search(rf"{re.escape(options.only)}(:\d+)?$", place):
                    continue
                path.write_text(changed)
                passed, last = run(command, copy)
                tried += 1
                print(f"{'MISSED' if passed else 'caught'}  {place}  {last}", flush=True)
                missed += [place] if passed else []
            path.write_text(original)
    print(f"{tried} barriers deleted, {len(missed)} missed", *missed, sep="\n  ")
    return 1 if missed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
