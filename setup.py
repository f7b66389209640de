import json
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)
sys.path.insert(0, os.path.abspath("tools"))

from build_error import BuildError  # noqa: E402
from compile import TARGET_TORCH, compile_libraries  # noqa: E402
from find_cuda import check_platform, find_torch, make_plan  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:
    raise BuildError(
        f"needs setuptools 77 or later to build; this environment has {setuptools.__version__}. "
        f"Upgrade it: {sys.executable} -m pip install 'setuptools>=77' ninja"
    )


class Build(build_ext):
    """Compiles the libraries and puts them into the package, with a record of how."""

    def run(self):
        check_platform()
        torch = find_torch(TARGET_TORCH)
        plan = make_plan(torch.version, torch.cuda)
        # Kept between builds, also by editable installs, whose default is a temporary folder; one
        # for each Python, torch and target, because their objects do not mix.
        kind = f"cu{plan.toolkit.version}" if plan.toolkit else "cpu"
        folder = Path(f"build/{sys.implementation.cache_tag}-torch{torch.version}-{kind}")
        record = compile_libraries(folder, plan, torch)
        module = Path(self.get_ext_fullpath("gmc_cuda._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        replace(folder / "_C.so", module)
        replace(folder / "_ops.so", module.parent / "_ops.so")
        record = {"version": self.distribution.get_version(), **record}
        (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")
        replace(folder / "record.json", module.parent / "_build_config.json")
        if plan.left_out:
            print(plan.left_out, flush=True)
        print(record["summary"], flush=True)


def replace(source, target):
    """Copies a file to its place at once: a process may have the old one loaded, or load it now."""
    copy = target.with_name(target.name + ".new")
    shutil.copy2(source, copy)
    os.replace(copy, target)


# The module's sources are listed in tools/compile.py; named here, it makes the wheel a binary one.
setuptools.setup(
    ext_modules=[setuptools.Extension("gmc_cuda._C", [])], cmdclass={"build_ext": Build}
)
