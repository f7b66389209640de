"""Tests a wheel as users get it: installed into a new environment for each version of torch.

    python tools/test_wheel.py dist/gmc_cuda-*.whl              with 2.11.0, 2.13.0 and the newest
    python tools/test_wheel.py dist/gmc_cuda-*.whl --torch torch==2.12.0
    python tools/test_wheel.py dist/gmc_cuda-*.whl --torch installed    what this Python has
    python tools/test_wheel.py dist/gmc_cuda-*.whl --short    the main tests: 2.11.0 and installed

The tests run in a copy of this folder without the package, so that what they import is the wheel.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL, QUICK = ["torch==2.11.0", "torch==2.13.0", "torch"], ["torch==2.11.0", "installed"]
SHORT = ["info", "stable_abi", "errors", "ops", "optim"]
LEFT_OUT = shutil.ignore_patterns(
    "gmc_cuda", ".git", ".venv", "build", "dist", ".*_cache", ".hypothesis", "__py*"
)
WHERE = """
import sys, gmc_cuda, torch
print("torch", torch.__version__, "and", gmc_cuda.__file__)
assert gmc_cuda.__file__.startswith(sys.prefix)
"""


def test(wheel, torch, folder, pytest_arguments):
    """Installs both into folder/venv and runs the tests there; whether all passed."""
    print(f"{wheel.name} with {torch}", flush=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    variables = {key: os.environ[key] for key in os.environ if not key.startswith("PYTHON")}

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=folder / "tree", env=variables)
        return done.returncode == 0

    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    packages = [torch, f"gmc_cuda[demo,test] @ {wheel.resolve().as_uri()}"]
    if torch == "installed":
        packages = ["--no-deps", str(wheel.resolve())]
        folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (own,) = folder.glob("venv/lib/*/site-packages")
        (own / "installed.pth").write_text("\n".join(folders) + "\n")
    return (
        run("-m", "pip", "install", "--quiet", *packages)
        and run("-c", WHERE)
        and run("-m", "gmc_cuda.info")
        and run("-m", "pytest", "-q", *pytest_arguments)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", help="what pip is to install, or: installed")
    parser.add_argument("--short", action="store_true")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.short:
        pytest_arguments += [f"tests/test_{name}.py" for name in SHORT]
    versions = arguments.torch or (QUICK if arguments.short else ALL)
    passed = {}
    for torch in versions:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gmc_cuda-wheel-") as folder:
            passed[torch] = test(arguments.wheel, torch, Path(folder), pytest_arguments)
        print(f"{time.monotonic() - began:.0f} s for {torch}", flush=True)
    for torch, all_passed in passed.items():
        print(f"{arguments.wheel.name} with {torch}: {'passed' if all_passed else 'FAILED'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
