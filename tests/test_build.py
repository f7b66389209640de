"""What setup.py decides, and what a build that does not fit its environment says."""

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gmc_cuda._engine import library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build_toolkit():
    """The module of that name in tools/, which is no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("build_toolkit")


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_toolkit(home, version="13.0", archs=(80, 90, 100), cudart="lib64/libcudart_static.a"):
    """A folder that looks like a toolkit, with an nvcc that answers the questions asked of it."""
    listed = "\n".join(f"compute_{arch}" for arch in archs)
    write_program(
        home / "bin" / "nvcc",
        f"""case "$*" in
*--version*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
*--dryrun*) printf '#$ _SPACE_= \\n#$ TOP=%s\\n' "{home}/bin/.." >&2 ;;
*--list-gpu-arch*) echo "{listed}" ;;
esac
""",
    )
    for name in ("include/cuda_runtime.h", cudart):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    return home


@pytest.fixture
def find(build_toolkit, tmp_path):
    """find_toolkits over folders of the test alone; /bin serves the scripts."""

    def find(environ=None):
        environ = {"PATH": f"{tmp_path / 'path'}:/usr/bin:/bin", **(environ or {})}
        toolkits = build_toolkit.find_toolkits(
            environ, search_path=[str(tmp_path / "site-packages")], usual_places=tmp_path / "usual"
        )
        return [t for t in toolkits if tmp_path in t.home.parents]

    return find


def test_wrapper_script_leads_to_the_toolkit_it_starts(find, tmp_path):
    home = fake_toolkit(tmp_path / "far away" / "toolkit")
    write_program(tmp_path / "path" / "nvcc", f'exec "{home}/bin/nvcc" "$@"\n')
    (found,) = find()
    assert (found.home, found.version) == (home, "13.0")
    assert found.nvcc.exists() and found.include.exists()


def test_link_leads_to_the_toolkit_too(build_toolkit, tmp_path):
    home = fake_toolkit(tmp_path / "toolkit")
    write_program(home / "bin" / "nvcc", 'echo "release 12.8"\n')  # says nothing of its folders
    (tmp_path / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert build_toolkit.toolkit_of(tmp_path / "nvcc").home == home


@pytest.mark.parametrize("missing", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_incomplete_toolkit_is_none(find, tmp_path, missing):
    home = fake_toolkit(tmp_path / "usual" / "cuda")
    assert len(find()) == 1
    (home / missing).unlink()
    assert find() == []


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_named_toolkit_is_the_only_candidate(find, tmp_path, variable):
    fake_toolkit(tmp_path / "usual" / "cuda")
    mine = fake_toolkit(tmp_path / "mine", version="12.8")
    assert [t.home for t in find({variable: str(mine)})] == [mine]
    assert find({variable: str(tmp_path / "nothing here")}) == []


def test_usual_places_newest_first_and_each_once(find, tmp_path):
    homes = [
        fake_toolkit(tmp_path / "usual" / f"cuda-12.{minor}", f"12.{minor}") for minor in (4, 10)
    ]
    (tmp_path / "usual" / "cuda").symlink_to(homes[0])
    assert [t.version for t in find()] == [
        "12.4",
        "12.10",
    ]  # the link is the administrator's choice
    (tmp_path / "usual" / "cuda").unlink()
    assert [t.version for t in find()] == ["12.10", "12.4"]


def test_pip_toolkit_is_found(find, tmp_path):
    home = tmp_path / "site-packages" / "nvidia" / "cu13"
    fake_toolkit(home, cudart="lib/libcudart_static.a")
    (found,) = find()
    assert found.cudart_static == home / "lib" / "libcudart_static.a"


def test_real_compiler_belongs_to_a_real_toolkit(build_toolkit):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on the path")
    toolkit = build_toolkit.toolkit_of(nvcc)
    assert (toolkit.include / "cuda_runtime.h").exists()
    known = build_toolkit.run(toolkit.nvcc, "--list-gpu-arch")
    assert build_toolkit.arch_list({}, known).startswith("8.0;9.0")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ((75, 80, 90, 100, 120), "8.0;9.0;10.0+PTX"),
        ((70, 80, 90), "8.0;9.0+PTX"),
        ((52, 70, 80), "8.0+PTX"),
        ((), "8.0+PTX"),
    ],
)
def test_default_archs_are_those_the_compiler_knows(build_toolkit, known, expected):
    listed = "\n".join(f"compute_{arch}" for arch in known)
    assert build_toolkit.arch_list({}, listed) == expected
    assert build_toolkit.arch_list({"TORCH_CUDA_ARCH_LIST": "native"}, listed) == expected
    assert build_toolkit.arch_list({"TORCH_CUDA_ARCH_LIST": "8.6 9.0"}, listed) == "8.6 9.0"


@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("9.0", ["compute_90,code=sm_90"]),
        ("8.0;9.0a", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("8.6 10.0+PTX", ["compute_86,code=sm_86", "compute_100,code=sm_100",
                          "compute_100,code=compute_100"]),
    ],
)  # fmt: skip
def test_archs_become_flags_of_the_compiler(build_toolkit, archs, codes):
    compile = importlib.import_module("compile")
    assert compile.gencode_flags(archs) == [f"-gencode=arch={code}" for code in codes]
    with pytest.raises(SystemExit, match="'Hopper' is not of the form 9.0"):
        compile.gencode_flags("9.0;Hopper")


def test_torch_is_found_without_importing_it(build_toolkit):
    import torch

    found = build_toolkit.find_torch("2.11")
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert (found.folder / "include" / "torch" / "csrc" / "stable").is_dir()


def test_a_build_without_torch_or_with_an_old_one_says_so(build_toolkit, monkeypatch):
    with pytest.raises(SystemExit, match=r"torch 99\.0 or later is needed to build; this env"):
        build_toolkit.find_torch("99.0")
    monkeypatch.setattr(build_toolkit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="must be installed where the extension is built"):
        build_toolkit.find_torch("2.11")


@pytest.fixture
def plan(build_toolkit, tmp_path):
    """make_plan with toolkits of the given versions found, and no others."""

    def plan(torch_cuda, toolkits=(), **environ):
        homes = [fake_toolkit(tmp_path / version, version) for version in toolkits]
        found = [build_toolkit.toolkit_of(home / "bin" / "nvcc") for home in homes]
        return build_toolkit.make_plan("2.15.0", torch_cuda, environ, find=lambda _: found)

    return plan


def test_plan_takes_the_toolkit_of_torchs_major_version(plan):
    assert plan("13.2", ["12.8", "13.0"]).toolkit.version == "13.0"
    assert plan("12.6", ["13.0", "12.8"]).toolkit.version == "12.8"
    assert plan("13.2", ["13.0"], FORCE_CUDA="1").archs == "8.0;9.0;10.0+PTX"
    assert plan("13.2", ["13.0"], FORCE_CPU="1").toolkit is None
    assert plan("13.2", ["13.0"], FORCE_CPU="0").toolkit


@pytest.mark.parametrize(
    ("torch_cuda", "toolkits", "reason"),
    [
        (None, ["13.0"], "torch 2.15.0 is a build without CUDA"),
        ("13.2", [], "no CUDA toolkit"),
        ("13.2", ["12.8"], "major versions must be the same"),
    ],
)
def test_without_cuda_the_reason_is_said_and_force_cuda_fails(plan, torch_cuda, toolkits, reason):
    without = plan(torch_cuda, toolkits)
    assert without.toolkit is None and reason in without.reason
    with pytest.raises(SystemExit, match=reason):
        plan(torch_cuda, toolkits, FORCE_CUDA="1")


def test_contradicting_or_unclear_switches_are_errors(plan):
    with pytest.raises(SystemExit, match="exclude each other"):
        plan("13.2", ["13.0"], FORCE_CUDA="1", FORCE_CPU="1")
    with pytest.raises(SystemExit, match="FORCE_CUDA is 'yes'"):
        plan("13.2", ["13.0"], FORCE_CUDA="yes")


def test_record_of_this_build_agrees_with_the_binary():
    config = library.build_config
    assert config["with_cuda"] == hasattr(library.extension, "devices")
    assert bool(config["cuda"]) == config["with_cuda"] == bool(config["arch_list"])
    assert "-ffp-contract=off" in config["cxx_flags"]
    assert config["summary"].startswith("gmc_cuda: built for ")


RUNTIME_WITH_AN_ERROR = """
#include <string>
#define CUDART_VERSION 13000
enum cudaError_t { cudaErrorInsufficientDriver = 35, cudaErrorInvalidDeviceFunction = 98,
                   cudaErrorNoKernelImageForDevice = 209, cudaErrorUnsupportedPtxVersion = 222 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "words of the runtime"; }
inline int cudaGetDevice(int*) { return 0; }
inline int cudaDriverGetVersion(int* version) { return *version = 12060; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrComputeCapabilityMajor ? 8 : 6;
}
"""


@pytest.fixture(scope="module")
def explain(tmp_path_factory):
    """What csrc/cuda/error.h makes of an error, on a device of capability 8.6."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "cuda_runtime.h").write_text(RUNTIME_WITH_AN_ERROR)
    (folder / "main.cpp").write_text(
        '#include "cuda/error.h"\n#include <cstdio>\n#include <cstdlib>\n'
        "int main(int, char** arguments) {\n"
        "  puts(gmc::explain(cudaError_t(atoi(arguments[1]))).c_str());\n}\n"
    )
    command = ["c++", "-std=c++17", f"-I{folder}", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"]
    subprocess.run([*command, '-DGMC_CUDA_ARCHS="8.0;9.0"'], check=True, cwd=folder)
    return lambda code: subprocess.check_output([folder / "main", str(code)], text=True)


@pytest.mark.parametrize("code", [98, 209, 222])
def test_a_device_that_the_build_has_no_code_for_is_named_with_the_way_out(explain, code):
    text = explain(code)
    assert "words of the runtime: the device has capability 8.6" in text
    assert "gmc_cuda was built for 8.0;9.0. " in text
    assert "TORCH_CUDA_ARCH_LIST=8.6 pip install " in text


def test_a_driver_that_is_too_old_is_named_with_the_way_out(explain):
    text = explain(35)
    assert "built with CUDA 13.0, and the driver knows CUDA 12.6. Update the driver" in text


def test_other_errors_keep_the_runtimes_words(explain):
    assert explain(1) == "words of the runtime\n"


@pytest.mark.parametrize("version", ["2.11.0", "2.11.1+cpu", "2.13.0+cu130", "3.0.0a0+git1234"])
def test_every_torch_from_the_oldest_on_will_do(version):
    library.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.2+cu126", "2.9.1", "1.13.0"])
def test_a_torch_that_is_too_old_is_refused(version):
    with pytest.raises(ImportError) as refused:
        library.check_torch(version)
    message = str(refused.value)
    assert f"needs torch 2.11 or later; this is torch {version}" in message
    assert f"{shlex.quote(sys.executable)} -m pip install --upgrade 'torch>=2.11'" in message


def test_an_old_torch_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(library.torch, "__version__", "2.10.0")
    monkeypatch.setattr(library.importlib, "import_module", lambda name: 1 / 0)
    with pytest.raises(ImportError, match="needs torch 2.11"):
        library.load()


@pytest.mark.parametrize("part", ["the module", "the operators"])
def test_the_loaders_own_words_are_kept(monkeypatch, part):
    def fail(name):
        raise OSError(f"{name}: undefined symbol: that")

    if part == "the module":
        monkeypatch.setattr(library.importlib, "import_module", fail)
    else:
        monkeypatch.setattr(library.torch.ops, "load_library", fail)
    with pytest.raises(ImportError, match=r"does not load: .*undefined symbol: that") as refused:
        library.load()
    python = shlex.quote(sys.executable)
    assert f"{python} -m pip install --no-build-isolation --no-deps" in str(refused.value)


def test_another_python_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(library, "read_record", lambda: {"python": "3.1.4"})
    monkeypatch.setattr(library.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"is built for Python 3\.1\.4, and this is Python 3\."):
        library.load()


def test_never_built_says_how_to_build(tmp_path):
    package = tmp_path / "gmc_cuda" / "_engine"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (tmp_path / "setup.py").touch()
    shutil.copy(library.__file__, package)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # An editable install would find the missing module in the checkout.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "import gmc_cuda._engine.library"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert "gmc_cuda is not built" in done.stderr
    assert f"-m pip install --no-build-isolation --no-deps -e {tmp_path}" in done.stderr
