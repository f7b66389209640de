"""What setup.py builds, and with which CUDA toolkit: decided on what is installed, never on
whether a GPU is visible, so that a build machine without one builds the same package."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_error import BuildError
from cuda_archs import choose_archs


def check_platform(platform=sys.platform):
    """BuildError where the libraries cannot be built or loaded."""
    if platform != "linux":
        raise BuildError(
            f"it can be built on Linux only, and this is {platform}: the libraries need GNU "
            "linking, and CUDA training on several machines runs on Linux. On Windows build it "
            "inside WSL 2, elsewhere in a Linux container"
        )


@dataclass(frozen=True)
class Torch:
    """The torch to build with: its folder, its version and its CUDA version, or None."""

    folder: Path
    version: str
    cuda: str | None


def find_torch(oldest):
    """The torch of this Python, found without importing it: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            f"torch {oldest} or later must be installed where the extension is built, and the "
            "build must use it: pip install --no-build-isolation ."
        )
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    torch = Torch(folder, version["__version__"], version["cuda"])
    if [int(part) for part in torch.version.split(".")[:2]] < list(map(int, oldest.split("."))):
        raise BuildError(
            f"torch {oldest} or later is needed to build; this environment has {torch.version}. "
            f"Upgrade it: {sys.executable} -m pip install 'torch>={oldest}'"
        )
    return torch


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder and its version, "13.0"."""

    home: Path
    version: str

    @property
    def major(self):
        return self.version.split(".")[0]

    @property
    def nvcc(self):
        return self.home / "bin" / "nvcc"

    @property
    def include(self):
        return self.home / "include"

    @property
    def cudart_static(self):
        """The CUDA runtime to link with, or None."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (self.home / folder / "libcudart_static.a").exists():
                return self.home / folder / "libcudart_static.a"
        return None


@dataclass(frozen=True)
class Plan:
    """What to build: for CUDA when `toolkit` is set, for the CPU alone otherwise."""

    toolkit: Toolkit | None
    archs: str  # in the form of TORCH_CUDA_ARCH_LIST; "" without CUDA
    reason: str  # why there is no CUDA; "" with it
    left_out: str = ""  # a line about architectures that were asked for in vain; "" without any


def flag(name, environ):
    """An on/off variable of the environment: 1 is on; 0, empty and unset are off."""
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name} is {value!r}; it must be 1 (on), or 0 or unset (off).")
    return value == "1"


def run(*command):
    """What a command prints, stdout and stderr together; "" when it cannot be started."""
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def toolkit_of(nvcc):
    """The toolkit that a compiler belongs to, or None when it is not a usable one.

    `nvcc` may be a wrapper script in a folder of its own (distributions, ccache, clusters), so
    the compiler itself is asked: a dry run prints the folders it works with.
    """
    release = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))
    if not release:
        return None
    said = run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    guesses = [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)]
    guesses += [
        Path(here.strip()).parent for here in re.findall(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    ]
    guesses += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    for home in guesses:
        toolkit = Toolkit(Path(os.path.abspath(home)), release.group(1))
        runtime_header = toolkit.include / "cuda_runtime.h"
        if toolkit.nvcc.exists() and runtime_header.exists() and toolkit.cudart_static:
            return toolkit
    return None


def find_toolkits(environ, search_path=sys.path, usual_places=Path("/usr/local")):
    """All usable toolkits, best first. CUDA_HOME or CUDA_PATH, when set, is the only candidate."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            toolkit = toolkit_of(Path(environ[variable]) / "bin" / "nvcc")
            return [toolkit] if toolkit else []
    candidates = []
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(usual_places / "cuda" / "bin" / "nvcc")
    candidates += sorted(usual_places.glob("cuda-*/bin/nvcc"), key=_version_key, reverse=True)
    for folder in search_path:  # pip's nvidia-cuda-nvcc
        candidates += sorted(Path(folder or ".").glob("nvidia/cu[0-9]*/bin/nvcc"), reverse=True)
    toolkits = {}
    for nvcc in candidates:
        toolkit = toolkit_of(nvcc) if nvcc.exists() else None
        if toolkit:
            toolkits.setdefault(toolkit.home.resolve(), toolkit)
    return list(toolkits.values())


def _version_key(nvcc):
    return [int(number) for number in re.findall(r"\d+", nvcc.parts[-3])]


def make_plan(torch_version, torch_cuda, environ=os.environ, find=find_toolkits):
    """Decides what is built for a torch whose `torch.version.cuda` is `torch_cuda`.

    FORCE_CUDA=1 makes it an error when CUDA cannot be built, FORCE_CPU=1 leaves CUDA out.
    """
    force_cuda, force_cpu = flag("FORCE_CUDA", environ), flag("FORCE_CPU", environ)
    if force_cuda and force_cpu:
        raise BuildError("FORCE_CUDA=1 and FORCE_CPU=1 exclude each other; set one of them.")
    if force_cpu:
        return Plan(None, "", "FORCE_CPU=1")

    toolkit, reason = None, ""
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    else:
        toolkits = find(environ)
        same = [found for found in toolkits if found.major == torch_cuda.split(".")[0]]
        if same:
            toolkit = same[0]
        elif toolkits:
            found = ", ".join(f"{found.version} in {found.home}" for found in toolkits)
            reason = (
                f"torch {torch_version} is built for CUDA {torch_cuda}, and the toolkit found is "
                f"{found}: the major versions must be the same"
            )
        else:
            chosen = [name for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
            where = f"{chosen[0]}={environ[chosen[0]]}" if chosen else "any of the usual places"
            reason = f"no CUDA toolkit (nvcc, headers and libcudart_static.a) was found in {where}"
    if toolkit:
        known = run(toolkit.nvcc, "--list-gpu-arch")
        archs, left_out = choose_archs(environ.get("TORCH_CUDA_ARCH_LIST", ""), known)
        return Plan(toolkit, archs, "", left_out)
    if force_cuda:
        raise BuildError(
            f"FORCE_CUDA=1, but {reason}. Install a CUDA toolkit and a CUDA build of torch of the "
            "same major version, and set CUDA_HOME if the toolkit is in an unusual place."
        )
    return Plan(None, "", reason)
