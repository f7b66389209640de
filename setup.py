import json
import os
import platform
import subprocess
import sys
from glob import glob
from pathlib import Path

import setuptools

os.chdir(Path(__file__).resolve().parent)
sys.path.insert(0, os.getcwd())  # pip runs this file without its folder on the path

from build_toolkit import BuildError, make_plan, ninja_folder  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:
    raise BuildError(
        f"needs setuptools 77 or later to build; this environment has {setuptools.__version__}. "
        f"Upgrade it: {sys.executable} -m pip install 'setuptools>=77' ninja"
    )


def extension_and_command():
    """The extension gmc_cuda._C and the command that builds it and records how."""
    import torch

    plan = make_plan(torch.__version__, torch.version.cuda)
    if plan.toolkit:  # torch reads both when cpp_extension is imported
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    os.environ["PATH"] += os.pathsep + ninja_folder()
    from torch.utils import cpp_extension

    # Contracting a*b + c into one rounding would give every backend its own bits. -fopenmp is
    # for the compiler only: the runtime must be the one that torch has loaded, whatever its name.
    cxx_flags = ["-O3", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]
    nvcc_flags = ["-O3", "--fmad=false", "-lineinfo", "-Xcompiler"]
    nvcc_flags += ["-ffp-contract=off,-Wall,-Wextra"]
    make = cpp_extension.CUDAExtension if plan.toolkit else cpp_extension.CppExtension
    extension = make(
        "gmc_cuda._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
        + (sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")) if plan.toolkit else []),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        define_macros=[("GMC_WITH_CUDA", "1")] if plan.toolkit else [],
    )
    # torch's headers as system headers: no warnings from them, and none of them for .cu files.
    system = [argument for folder in extension.include_dirs for argument in ("-isystem", folder)]
    extension.include_dirs = [os.path.abspath("csrc")]
    extension.extra_compile_args = {"cxx": cxx_flags + system, "nvcc": nvcc_flags}
    if plan.toolkit and plan.toolkit.cudart.name != "libcudart.so":  # pip's has no plain name
        extension.libraries.remove("cudart")
        extension.extra_link_args.append(str(plan.toolkit.cudart))

    target = f"CUDA {plan.toolkit.version} ({plan.archs})" if plan.toolkit else "the CPU only"
    why = f"toolkit in {plan.toolkit.home}" if plan.toolkit else plan.reason
    summary = (
        f"gmc_cuda: built for {target}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {why}"
    )

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Kept between builds, also by editable installs, whose default is a temporary
            # folder; one per Python, torch and target, because their objects do not mix.
            kind = f"cu{plan.toolkit.version}" if plan.toolkit else "cpu"
            self.build_temp = (
                f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-{kind}"
            )

        def run(self):
            try:
                super().run()
            except RuntimeError as error:  # torch's, below a long traceback of no use
                raise BuildError(f"{error}: see the compiler's message after FAILED") from None
            compiler = subprocess.run(
                [cpp_extension.get_cxx_compiler(), "--version"], capture_output=True, text=True
            )
            built = {
                "version": self.distribution.get_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "with_cuda": plan.toolkit is not None,
                "cuda": plan.toolkit.version if plan.toolkit else None,
                "arch_list": plan.archs,
                "compiler": compiler.stdout.split("\n")[0],
                "cxx_flags": " ".join(cxx_flags),
                "nvcc_flags": " ".join(nvcc_flags) if plan.toolkit else "",
                "summary": summary,
            }
            folder = Path("" if self.editable_mode or self.inplace else self.build_lib, "gmc_cuda")
            folder.joinpath("_build_config.json").write_text(json.dumps(built, indent=2) + "\n")
            print(summary, flush=True)

    return [extension], {"build_ext": Build}


try:
    ext_modules, cmdclass = extension_and_command()
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    if not {"egg_info", "sdist", "dist_info"} & set(sys.argv):
        raise BuildError(
            "torch 2.11 or later must be installed where the extension is built, and the build "
            "must use it: pip install --no-build-isolation ."
        ) from None
    ext_modules, cmdclass = [], {}

setuptools.setup(ext_modules=ext_modules, cmdclass=cmdclass)
