"""Compile .cu files with g++ against the shim, into a program that program.py talks to, or into a
library of operators that torch loads (whole_library.py).

Three flavours: "plain", "address" (address and undefined-behaviour sanitizers) and "thread" (thread
sanitizer). Objects and programs are kept in build/, named by a hash of everything they depend on.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
# delete_barriers.py points this at a changed copy of csrc.
CUDA_SOURCES = Path(os.environ.get("GMC_CUDA_SOURCES", HERE.parent.parent / "csrc"))

COMMON = [
    "-std=c++17", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-omit-frame-pointer",
    "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function",
    "-fPIC", "-fvisibility=hidden",  # the same objects serve programs and libraries
]  # fmt: skip
INSTRUMENT = {
    "plain": [],
    "address": [
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=cuda_shared.*",  # redzones around shared variables too
    ],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
LINK = {
    "plain": [],
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread"],
}
# The name in a declaration such as `static __shared__ __align__(16) T name[4 * n];`
SHARED = re.compile(r"__shared__\s[^;=]*?(\w+)\s*(?:\[[^;]*)?;")
FLAVOURS = tuple(INSTRUMENT)


class CompileError(Exception):
    """g++ refused a source; the message is its output."""


@cache
def compiler():
    """(path, version) of GCC's g++, or None where there is none."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return (path, version) if "Free Software Foundation" in version else None


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stderr}")


def _check_shared_variables(target, texts):
    """Refuse what the executor could not treat as shared memory, or not guard as such."""
    declared = {name for text in texts for name in SHARED.findall(text)}
    listing = subprocess.run(
        ["nm", "-C", "-f", "sysv", target], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        name, *fields = (field.strip() for field in line.rsplit("|", 6))
        if len(fields) != 6 or not fields[5].startswith(("cuda_shared", ".bss._ZZ")):
            continue
        if name.rpartition("::")[2] not in declared:
            raise CompileError(
                f"static variable {name} is not __shared__: a .cu file must not keep any other "
                "variable inside a function, because shared.ld would take it for shared memory"
            )
        if fields[1] in "uVvWw":
            raise CompileError(
                f"shared variable {name}: put the function that holds it into an anonymous "
                "namespace; in a template or inline function elsewhere its bounds are not checked"
            )


def _headers(folders):
    for folder in folders:
        for suffix in ("*.h", "*.cuh", "*.hpp"):
            yield from sorted(Path(folder).rglob(suffix))


def _digest(flags, files):
    digest = hashlib.sha256(repr((compiler(), flags)).encode())
    for file in files:
        digest.update(str(file).encode() + b"\0" + Path(file).read_bytes())
    return digest.hexdigest()[:16]


def _make(target, command, check=lambda scratch: None):
    """Run command with "-o scratch file", then rename, unless another pytest does so meanwhile."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        scratch = target.with_name(f"{os.getpid()}-{target.name}")
        _run([*command, "-o", scratch])
        check(scratch)
        os.replace(scratch, target)


def _compile(source, flags, headers):
    # shared.ld looks for shared variables in *.cu.o
    target = BUILD / f"{source.stem}-{_digest(flags, [source, *headers])}{source.suffix}.o"
    if not target.exists():
        texts = [path.read_text() for path in (source, *headers)]
        _make(
            target,
            [compiler()[0], *flags, "-x", "c++", "-c", source],
            lambda scratch: source.suffix == ".cu" and _check_shared_variables(scratch, texts),
        )
    return target


def _objects(sources, flavour, executor, defines, include, flags=()):
    """Compiles sources and the named parts of the executor; returns the object files."""
    BUILD.mkdir(exist_ok=True)
    own = [HERE / "shim", HERE / "executor"]
    executor_flags = [*COMMON, "-O2", "-fcf-protection=none", f"-DEXECUTOR_{flavour.upper()}"]
    kernel_flags = [*COMMON, "-O1", "-fdata-sections", *INSTRUMENT[flavour]]
    kernel_flags += [f"-I{folder}" for folder in (*own, *include)]
    kernel_flags += flags
    own_headers = list(_headers(own))
    jobs = [(path, executor_flags, own_headers) for path in executor]
    headers = [*own_headers, *_headers(include)]
    for source in sources:
        path, extra = source if isinstance(source, tuple) else (source, ())
        macros = [f"-D{define}" for define in (*defines, *extra)]
        jobs.append((Path(path), [*kernel_flags, *macros], headers))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs))


def _link(name, objects, flags):
    script = HERE / "executor" / "shared.ld"
    link = [*flags, f"-Wl,-T,{script}"]
    target = BUILD / f"{name}-{_digest(link, [*objects, script])}"
    if not target.exists():
        _make(target, [compiler()[0], *objects, *link])
    return target


def build(sources, flavour, defines=(), include=()):
    """Compile and link sources (.cu and .cpp); return the program's path.

    sources: paths, or (path, defines) for macros of one source alone; one source at least registers
        a CUDA_CASE (executor/case.h).
    flavour: one of FLAVOURS.
    defines: macros to define, "NAME" or "NAME=value".
    include: folders to search for headers; every header below them counts as an input.
    Raises CompileError.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour is {flavour!r}, but must be one of {', '.join(FLAVOURS)}")
    executor = sorted((HERE / "executor").glob("*.cpp"))
    objects = _objects(sources, flavour, executor, defines, include)
    return _link("program", objects, LINK[flavour])


def build_library(sources, torch_sources, torch_flags, libraries, defines=(), include=()):
    """Compile and link a library of operators for torch; return its path.

    sources: .cu files, compiled as by build().
    torch_sources: .cpp files that see tensors, compiled with torch_flags as well.
    libraries: the linker's options for torch's libraries.
    defines, include: as for build().
    Raises CompileError.
    """
    executor = sorted(path for path in (HERE / "executor").glob("*.cpp") if path.stem != "case")
    objects = _objects(sources, "plain", executor, defines, include)
    objects += _objects(torch_sources, "plain", [], defines, include, torch_flags)
    return _link("library", objects, ["-shared", "-Wl,-Bsymbolic", *libraries])
