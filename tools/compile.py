"""Compiles the two libraries of the package with ninja: what is compiled, with which flags."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import metadata

from build_error import BuildError
from cuda_archs import gencode_flags
from host_compiler import find_compiler

# The oldest torch whose stable interface is used. What is built with it runs with every later one.
TARGET_TORCH = "2.11"

# Contracting a*b + c into one rounding would give every backend its own bits; splitting a loop into
# a memcpy and the rest makes it read memory twice.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
CXX_FLAGS += ["-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra"]
NOT_OF_CLANG = ["-fno-tree-loop-distribute-patterns"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Xcompiler"]
NVCC_FLAGS += ["-fPIC,-ffp-contract=off,-fvisibility=hidden,-Wall,-Wextra"]

RULES = """
rule cxx
  command = $cxx -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule nvcc
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = $cxx -shared $in -o $out $flags
  description = $out
"""


def ninja():
    """The ninja program: on the path, or where pip has put it while its environment is not."""
    try:
        files = metadata.files("ninja") or []
    except metadata.PackageNotFoundError:
        files = []
    programs = [str(file.locate()) for file in files if file.name == "ninja"]
    found = next(filter(os.path.isfile, programs), None) or shutil.which("ninja")
    if not found:
        raise BuildError(f"ninja is needed to build: {sys.executable} -m pip install ninja")
    return found


def python_headers():
    """The folder with Python.h, which distributions package apart from Python itself."""
    folder = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        version = ".".join(platform.python_version_tuple()[:2])
        raise BuildError(
            f"Python's headers are needed to build, and {folder} has no Python.h. On Debian and "
            f"Ubuntu install them by apt-get install python{version}-dev, on Fedora by dnf install "
            f"python{version}-devel"
        )
    return folder


def cxx_flags(cxx):
    """The flags of every C++ file for this compiler."""
    return [flag for flag in CXX_FLAGS if not (cxx.is_clang and flag in NOT_OF_CLANG)]


def jobs(environ=os.environ):
    """ninja's option for MAX_JOBS, the number of compilers at a time; by default it decides."""
    asked = environ.get("MAX_JOBS", "").strip()
    if asked and not (asked.isascii() and asked.isdigit() and int(asked) > 0):
        raise BuildError(f"MAX_JOBS is {asked!r}; it must be a whole number from 1 on, or unset")
    return ["-j", asked] if asked else []


def write_ninja_file(folder, plan, torch_folder, cxx):
    """Writes folder/build.ninja, which makes folder/_ops.so and folder/_C.so of csrc/.

    _ops.so has the operators and knows torch, but no Python; _C.so is a Python module and knows
    no torch. Paths are relative to the sources' folder, where ninja runs.
    """
    torch_target = int(TARGET_TORCH.split(".")[0]) << 56 | int(TARGET_TORCH.split(".")[1]) << 48
    include = ["-Icsrc", "-isystem", str(torch_folder / "include")]
    macros = [f"-DTORCH_TARGET_VERSION={torch_target:#x}"]
    archs_macro = f'-DGMC_CUDA_ARCHS="{plan.archs}"'
    # The module's function is called once: optimized, they would only compile longer.
    python = ["-O0", "-isystem", python_headers()]
    # By their names alone, so that the torch that is running, which has them loaded, provides
    # them. libtorch.so leads to libtorch_cuda.so where torch has one, and is kept in spite of
    # having no symbols. libstdc++ comes first, because torch's libraries hold parts of it, too.
    torch_libraries = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
    torch_libraries += ["-lstdc++", "-ltorch", "-ltorch_cpu"]
    link = ["-Wl,--exclude-libs,ALL"]
    if plan.toolkit:
        include += ["-isystem", str(plan.toolkit.include)]
        macros += ["-DGMC_WITH_CUDA", "-DUSE_CUDA", archs_macro]
        # A runtime of our own: torch's may be of another CUDA version, or absent.
        link += [str(plan.toolkit.cudart_static), "-ldl", "-lrt", "-lpthread"]

    common = cxx_flags(cxx)
    cuda = ["csrc/torch/stream.cpp", "csrc/cuda/*.cu"] if plan.toolkit else []
    sources = {
        "_C": ["csrc/module.cpp"],
        "_ops": ["csrc/torch/ops.cpp", "csrc/torch/checks.cpp", "csrc/cpu/*.cpp", *cuda],
    }
    libraries = {"_ops": link + torch_libraries, "_C": ["-Wl,--exclude-libs,ALL", "-lstdc++"]}

    def flags(source):
        if source.endswith(".cu"):
            host = cxx.for_nvcc
            return NVCC_FLAGS + host + gencode_flags(plan.archs) + ["-Icsrc"]
        return common + macros + include + (python if source == "csrc/module.cpp" else [])

    def path(text):
        return re.sub(r"([$ :])", r"$\1", str(text))

    def command(words):
        return shlex.join(map(str, words)).replace("$", "$$")

    lines = [f"builddir = {path(folder)}", f"cxx = {command(cxx.command)}"]
    lines += [f"nvcc = {command([plan.toolkit.nvcc])}"] if plan.toolkit else []
    lines += [RULES]
    for library, patterns in sources.items():
        objects = []
        for source in (file for pattern in patterns for file in sorted(glob(pattern))):
            objects.append(path(folder / f"{source}.o"))
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            lines.append(f"build {objects[-1]}: {rule} {path(source)}")
            lines.append(f"  flags = {command(flags(source))}")
        lines.append(f"build {path(folder / library)}.so: link {' '.join(objects)}")
        lines.append(f"  flags = {command(libraries[library])}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def compile_libraries(folder, plan, torch):
    """Compiles what has changed; returns how, for the record that is installed."""
    cxx = find_compiler()
    write_ninja_file(folder, plan, torch.folder, cxx)
    if subprocess.run([ninja(), "-f", str(folder / "build.ninja"), *jobs()]).returncode:
        raise BuildError("the compiler failed: see its message after FAILED")
    target = f"CUDA {plan.toolkit.version} ({plan.archs})" if plan.toolkit else "the CPU only"
    why = f"toolkit in {plan.toolkit.home}" if plan.toolkit else plan.reason
    return {
        "python": platform.python_version(),
        "torch": torch.version,
        "target_torch": TARGET_TORCH,
        "with_cuda": plan.toolkit is not None,
        "cuda": plan.toolkit.version if plan.toolkit else None,
        "arch_list": plan.archs,
        "compiler": cxx.version,
        "cxx_flags": " ".join(cxx_flags(cxx)),
        "nvcc_flags": " ".join(NVCC_FLAGS) if plan.toolkit else "",
        "summary": f"gmc_cuda: built for {target}, torch {TARGET_TORCH} and later (headers of "
        f"{torch.version}), Python {platform.python_version()}; {why}",
    }
