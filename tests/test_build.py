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
def find_cuda():
    """The module of that name in tools/, which is no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("find_cuda")


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
def find(find_cuda, tmp_path):
    """find_toolkits over folders of the test alone; /bin serves the scripts."""

    def find(environ=None):
        environ = {"PATH": f"{tmp_path / 'path'}:/usr/bin:/bin", **(environ or {})}
        toolkits = find_cuda.find_toolkits(
            environ, search_path=[str(tmp_path / "site-packages")], usual_places=tmp_path / "usual"
        )
        return [t for t in toolkits if tmp_path in t.home.parents]

    return find


def test_wrapper_script_leads_to_the_toolkit_it_starts(find, tmp_path):
    home = fake_toolkit(tmp_path / "far away" / "toolkit")
    write_program(tmp_path / "path" / "nvcc", f'exec "{home}/bin/nvcc" "$@"\n')
    (found,) = find()
    assert (found.home, found.version) == (home, "13.0")
    assert found.nvcc.exists()
    assert found.include.exists()


def test_link_leads_to_the_toolkit_too(find_cuda, tmp_path):
    home = fake_toolkit(tmp_path / "toolkit")
    write_program(home / "bin" / "nvcc", 'echo "release 12.8"\n')  # says nothing of its folders
    (tmp_path / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert find_cuda.toolkit_of(tmp_path / "nvcc").home == home


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


def test_real_compiler_belongs_to_a_real_toolkit(find_cuda):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on the path")
    toolkit = find_cuda.toolkit_of(nvcc)
    assert (toolkit.include / "cuda_runtime.h").exists()
    known = find_cuda.run(toolkit.nvcc, "--list-gpu-arch")
    assert find_cuda.choose_archs("", known)[0].startswith("8.0;9.0")


# ------------------------------------------------------------------------- TORCH_CUDA_ARCH_LIST

KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120)  # roughly what CUDA 13's nvcc prints


@pytest.fixture
def choose(find_cuda):
    """choose_archs for a compiler that knows these architectures: the list, and what it says."""
    cuda_archs = importlib.import_module("cuda_archs")

    def choose(asked, known=KNOWN):
        archs, line = cuda_archs.choose_archs(asked, "\n".join(f"compute_{n}" for n in known))
        assert cuda_archs.gencode_flags(archs)  # whatever is chosen is in nvcc's form
        return archs, line

    return choose


@pytest.mark.parametrize("asked", ["", " ", ";", " , ;", "native", "Auto", "common", "''"])
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ((75, 80, 90, 100, 120), "8.0;9.0;10.0+PTX"),
        ((70, 80, 90), "8.0;9.0+PTX"),
        ((52, 70, 80), "8.0+PTX"),
        ((), "8.0+PTX"),
    ],
)
def test_default_archs_are_those_the_compiler_knows(choose, asked, known, expected):
    assert choose(asked, known) == (expected, "")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.6 9.0", "8.6;9.0"),
        ("8.0,9.0a", "8.0;9.0a"),
        ("8.0;;9.0+PTX;", "8.0;9.0+PTX"),
        ("'8.0 9.0'", "8.0;9.0"),  # quoted once too often, in a Dockerfile
        ("10.0f+ptx", "10.0f+PTX"),
        ("9.0 9.0+PTX 9.0", "9.0+PTX"),  # nvcc warns of one that comes twice
        ("Ada;hopper", "8.9+PTX;9.0+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("Hopper 9.0 9.0a", "9.0+PTX;9.0a"),
        ("all", "8.0;8.6;8.7;8.9;9.0;10.0;10.3;11.0;12.0+PTX"),
        ("all-major", "8.0;9.0;10.0;11.0;12.0+PTX"),
    ],
)
def test_every_form_of_the_list_is_understood(choose, asked, expected):
    assert choose(asked) == (expected, "")


@pytest.mark.parametrize(
    ("asked", "expected", "left_out"),
    [
        ("5.2 6.0 6.1 7.0 7.2 7.5 8.0 8.6 8.7 9.0+PTX", "8.0;8.6;8.7;9.0+PTX",
         "5.2, 6.0, 6.1, 7.0, 7.2, 7.5"),  # of NVIDIA's containers
        ("7.0;7.5;8.0;8.6;9.0", "8.0;8.6;9.0", "7.0, 7.5"),
        ("7.5 9.0a", "9.0a", "7.5"),
        ("Volta;Volta+Tegra;Hopper", "9.0+PTX", "7.0, 7.2"),
        # A device of capability 9.0 would have run by the PTX of 7.5, so one must be left for it.
        ("Turing;8.6;8.0", "8.6;8.0+PTX", "7.5"),
        ("6.1+PTX 9.0", "9.0+PTX", "6.1"),
    ],
)  # fmt: skip
def test_what_is_too_old_is_left_out_in_one_line(choose, asked, expected, left_out):
    line = f"left out {left_out}, because the kernels need 8.0 or later; built for {expected}"
    assert choose(asked) == (expected, f"gmc_cuda: TORCH_CUDA_ARCH_LIST: {line}")


@pytest.mark.parametrize("asked", ["7.5", "6.0 7.0+PTX", "Pascal", "Maxwell+Tegra;Turing"])
def test_a_list_that_is_all_too_old_is_refused(choose, asked):
    with pytest.raises(SystemExit, match="need compute capability 8.0 or later, and noth") as error:
        choose(asked)
    assert "TORCH_CUDA_ARCH_LIST='8.0+PTX', or FORCE_CPU=1" in str(error.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("9.0;Tesla", "'Tesla' is neither of the form 9.0, 9.0a or 9.0+PTX nor a generation"),
        ("80;90", "is 8.0 meant?"),  # CMake's form
        ("sm_90a", "is 9.0a meant?"),
        ("compute_100", "is 10.0 meant?"),
        ("9", "'9' is neither of the form"),
        ("8.0+PTX+PTX", "'8.0+PTX+PTX' is neither"),
        ("8.6a", "'8.6a' does not exist, because variants with a letter begin at 9.0a. Write 8.6"),
        ("9.0 13.0", "does not know 13.0. It knows 8.0, 8.6, 8.7"),
        ("Rubin", "does not know 10.7"),
    ],
)
def test_what_cannot_be_compiled_for_is_named(choose, asked, said):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST='.*") as error:
        choose(asked)
    assert said in str(error.value)


def test_an_old_nvcc_that_lists_nothing_is_trusted(choose):
    assert choose("8.0 12.0+PTX", ()) == ("8.0;12.0+PTX", "")
    with pytest.raises(SystemExit, match="does not say which architectures it knows"):
        choose("all", ())


@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("9.0", ["compute_90,code=sm_90"]),
        ("8.0;9.0a", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("8.6;10.0+PTX", ["compute_86,code=sm_86", "compute_100,code=sm_100",
                          "compute_100,code=compute_100"]),
    ],
)  # fmt: skip
def test_archs_become_flags_of_the_compiler(find_cuda, archs, codes):
    cuda_archs = importlib.import_module("cuda_archs")
    assert cuda_archs.gencode_flags(archs) == [f"-gencode=arch={code}" for code in codes]


def test_the_plan_keeps_what_was_left_out_for_the_end_of_the_build(plan):
    made = plan("13.2", ["13.0"], TORCH_CUDA_ARCH_LIST="7.5 8.0")
    assert made.archs == "8.0"
    assert "left out 7.5" in made.left_out
    # A build for the CPU does not look at the list.
    assert plan(None, TORCH_CUDA_ARCH_LIST="7.5").left_out == ""


# ------------------------------------------------------------------------ the platform, CXX, jobs


@pytest.mark.parametrize("platform", ["darwin", "win32", "cygwin", "freebsd14", "android"])
def test_another_platform_than_linux_is_refused_in_one_sentence(find_cuda, platform):
    with pytest.raises(SystemExit, match=f"built on Linux only, and this is {platform}: "):
        find_cuda.check_platform(platform)
    find_cuda.check_platform("linux")


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_importing_it_there_says_the_same(monkeypatch, platform):
    monkeypatch.setattr(library.sys, "platform", platform)
    assert f"runs on Linux only, and this is {platform}" in library.explain(None)


GCC = """case "$*" in
*--version*) echo "{name} 14.2" ;;
*-dM*) printf '#define __cplusplus %s\n' {cplusplus}; {more} ;;
esac
"""


@pytest.fixture
def compilers(find_cuda, tmp_path):
    """compilers(CXX) is find_compiler where these are on the path and no others."""

    def add(name, cplusplus="202002L", more=":"):
        text = GCC.format(name=name, cplusplus=cplusplus, more=more)
        write_program(tmp_path / "bin" / name, text)

    def find(cxx=None, only=("g++", "clang++", "cc", "old-g++")):
        shutil.rmtree(tmp_path / "bin", ignore_errors=True)
        for name in only:
            clang = "echo '#define __clang__ 1'" if "clang" in name else ":"
            add(name, "201103L" if "old" in name else "202002L", clang)
        for launcher in ("ccache", "sccache", "distcc"):
            write_program(tmp_path / "bin" / launcher, 'exec "$@"\n')
        environ = {"PATH": f"{tmp_path / 'bin'}"} | ({} if cxx is None else {"CXX": cxx})
        return importlib.import_module("host_compiler").find_compiler(environ)

    return find


@pytest.mark.parametrize(
    ("cxx", "command", "for_nvcc"),
    [
        ("g++", ["g++"], ["-ccbin", "g++"]),
        ("ccache g++", ["ccache", "g++"], ["-ccbin", "g++"]),
        ("sccache clang++", ["sccache", "clang++"], ["-ccbin", "clang++"]),
        ("ccache distcc g++", ["ccache", "distcc", "g++"], ["-ccbin", "g++"]),
        ("g++ -m64 -pipe", ["g++", "-m64", "-pipe"],
         ["-ccbin", "g++", "-Xcompiler=-m64", "-Xcompiler=-pipe"]),
        ("ccache g++ -m64", ["ccache", "g++", "-m64"], ["-ccbin", "g++", "-Xcompiler=-m64"]),
        ("/usr/bin/env LANG=C g++", ["/usr/bin/env", "LANG=C", "g++"], ["-ccbin", "g++"]),
        ("cc", ["cc"], ["-ccbin", "cc"]),
    ],
)  # fmt: skip
def test_cxx_may_have_launchers_and_flags(compilers, cxx, command, for_nvcc):
    found = compilers(cxx)
    assert (found.command, found.for_nvcc) == (command, for_nvcc)
    assert found.is_clang == ("clang" in cxx)
    assert found.version.endswith(" 14.2")


@pytest.mark.parametrize("cxx", [None, "", "  "])
def test_without_cxx_the_first_usual_compiler_is_taken(compilers, cxx):
    assert compilers(cxx).command == ["g++"]
    assert compilers(cxx, only=("c++", "g++")).command == ["c++"]
    found = compilers(cxx, only=("clang++",))
    assert (found.command, found.for_nvcc, found.is_clang) == (["clang++"], [], True)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found .* apt-get install g\+\+"):
        compilers(cxx, only=())


def test_a_path_with_a_space_is_one_word(compilers, tmp_path):
    there = tmp_path / "my tools" / "g++"
    write_program(there, GCC.format(name="mine", cplusplus="202002L", more=":"))
    assert compilers(str(there)).command == compilers(f'"{there}"').command == [str(there)]


@pytest.mark.parametrize(
    ("cxx", "said"),
    [
        ("no-such-g++", "there is no program 'no-such-g++' on this machine's PATH"),
        ("/opt/gone/bin/g++", "there is no program '/opt/gone/bin/g++'"),
        ("ccache no-such-g++", "there is no program 'no-such-g++'"),
        ("no-cache g++", "there is no program 'no-cache'"),
        ("-O2 g++", "begins with an option"),
        ('g++ "-m64', "cannot be read (No closing quotation)"),
        ("ccache", "does not compile C++20 (it said: "),
        ("old-g++", "does not compile C++20"),
    ],
)
def test_a_cxx_that_cannot_build_is_refused_in_one_sentence(compilers, cxx, said):
    with pytest.raises(SystemExit, match=r"must .*C\+\+20 \(g\+\+ 10 or later\)") as error:
        compilers(cxx)
    message = str(error.value).strip()
    assert f"CXX={cxx!r}" in message
    assert said in message
    assert "\n" not in message


def test_this_machines_compiler_will_do(find_cuda):
    host_compiler, compile = map(importlib.import_module, ("host_compiler", "compile"))
    found = host_compiler.find_compiler()
    assert subprocess.run([*found.command, "--version"], capture_output=True).returncode == 0
    flag = "-fno-tree-loop-distribute-patterns"
    assert (flag in compile.cxx_flags(found)) != found.is_clang


def test_the_launcher_starts_the_compiler_and_nvcc_gets_the_compiler_alone(
    compilers, plan, tmp_path, monkeypatch
):
    compile = importlib.import_module("compile")
    monkeypatch.chdir(ROOT)
    cxx = compilers("ccache g++ -m64")
    compile.write_ninja_file(tmp_path, plan("13.2", ["13.0"]), Path("/torch"), cxx)
    rules = (tmp_path / "build.ninja").read_text()
    assert "\ncxx = ccache g++ -m64\n" in rules
    assert " -ccbin g++ -Xcompiler=-m64 " in rules
    assert "-ccbin ccache" not in rules


@pytest.mark.parametrize("asked", ["four", "0", "-1", "2.5", "٣"])
def test_a_number_of_jobs_that_is_none_is_refused(find_cuda, asked):
    compile = importlib.import_module("compile")
    with pytest.raises(SystemExit, match=f"MAX_JOBS is '{asked}'; it must be a whole number"):
        compile.jobs({"MAX_JOBS": asked})
    assert compile.jobs({"MAX_JOBS": " 2 "}) == ["-j", "2"]
    assert compile.jobs({"MAX_JOBS": ""}) == compile.jobs({}) == []


def test_missing_headers_of_python_are_named(find_cuda, monkeypatch, tmp_path):
    compile = importlib.import_module("compile")
    assert (Path(compile.python_headers()) / "Python.h").exists()
    monkeypatch.setattr(compile.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        SystemExit, match=rf"{tmp_path} has no Python.h.*apt-get install python3\.\d"
    ):
        compile.python_headers()


# ------------------------------------------------------------------------------ torch and the plan


def test_torch_is_found_without_importing_it(find_cuda):
    import torch

    found = find_cuda.find_torch("2.11")
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert (found.folder / "include" / "torch" / "csrc" / "stable").is_dir()


def test_a_build_without_torch_or_with_an_old_one_says_so(find_cuda, monkeypatch):
    with pytest.raises(SystemExit, match=r"torch 99\.0 or later is needed to build; this env"):
        find_cuda.find_torch("99.0")
    monkeypatch.setattr(find_cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="must be installed where the extension is built"):
        find_cuda.find_torch("2.11")


@pytest.fixture
def plan(find_cuda, tmp_path):
    """make_plan with toolkits of the given versions found, and no others."""

    def plan(torch_cuda, toolkits=(), **environ):
        homes = [fake_toolkit(tmp_path / version, version) for version in toolkits]
        found = [find_cuda.toolkit_of(home / "bin" / "nvcc") for home in homes]
        return find_cuda.make_plan("2.15.0", torch_cuda, environ, find=lambda _: found)

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
    assert without.toolkit is None
    assert reason in without.reason
    with pytest.raises(SystemExit, match=reason):
        plan(torch_cuda, toolkits, FORCE_CUDA="1")


def test_contradicting_or_unclear_switches_are_errors(plan):
    with pytest.raises(SystemExit, match="exclude each other"):
        plan("13.2", ["13.0"], FORCE_CUDA="1", FORCE_CPU="1")
    with pytest.raises(SystemExit, match="FORCE_CUDA is 'yes'"):
        plan("13.2", ["13.0"], FORCE_CUDA="yes")


def test_record_of_this_build_agrees_with_the_binary():
    config = library.build_config
    assert config["with_cuda"] == library.extension.build_config()["with_cuda"]
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
