"""The C++ compiler that builds the libraries: $CXX, in every form in which people set it."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from build_error import BuildError

USUAL = ("c++", "g++", "clang++")
WANTED = "a compiler that knows C++20 (g++ 10 or later), as in CXX=g++"


@dataclass(frozen=True)
class HostCompiler:
    """A compiler and what comes before and after its name: ``ccache g++ -m64``."""

    launcher: tuple[str, ...]
    program: str
    flags: tuple[str, ...]
    version: str
    is_clang: bool
    named: bool  # by CXX

    @property
    def command(self):
        return [*self.launcher, self.program, *self.flags]

    @property
    def for_nvcc(self):
        """nvcc's flags that make it use this compiler.

        nvcc starts the program that -ccbin names, and takes no launcher and no flags with it.
        Without CXX it takes the one that it would take anyway, which NVCC_CCBIN may name.
        """
        if not self.named:
            return []
        return ["-ccbin", self.program, *(f"-Xcompiler={flag}" for flag in self.flags)]


def find_compiler(environ=os.environ):
    """The compiler to build with, after it has shown that it compiles C++20.

    Args:
        environ: CXX names it, with launchers before it (ccache, sccache, distcc) and flags after
            it. Unset or empty: c++, g++ or clang++, the first that there is.

    Raises:
        BuildError: there is none, or it cannot compile.
    """
    path, text = environ.get("PATH"), environ.get("CXX", "").strip()
    if not text:
        found = next((name for name in USUAL if shutil.which(name, path=path)), None)
        if found is None:
            raise BuildError(
                f"no C++ compiler was found ({', '.join(USUAL)}). Install one, on Debian and "
                "Ubuntu by apt-get install g++, or name it: CXX=/path/to/g++"
            )
        words = [found]
    elif os.path.isfile(text):  # a path may have a space in it
        words = [text]
    else:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise BuildError(
                f"CXX={text!r} cannot be read ({error}); it must name {WANTED}"
            ) from None
    options = [i for i, word in enumerate(words) if word.startswith("-")]
    last = (options[0] if options else len(words)) - 1  # launchers come before the compiler
    if last < 0:
        raise BuildError(f"CXX={text!r} begins with an option; it must name {WANTED}")
    for word in words[: last + 1]:
        if "=" not in word and not shutil.which(word, path=path):  # env NAME=value g++
            raise BuildError(
                f"CXX={text!r}: there is no program {word!r} on this machine's PATH; it must name "
                f"{WANTED}"
            )
    clang = "__clang__" in _macros(words, text, environ)
    version = _run([*words, "--version"], environ).stdout.partition("\n")[0]
    return HostCompiler(
        tuple(words[:last]), words[last], tuple(words[last + 1 :]), version, clang, bool(text)
    )


def _macros(words, text, environ):
    """The macros that a C++20 compiler has defined from the start."""
    asked = ["-std=c++20", "-dM", "-E", "-x", "c++", os.devnull]
    done = _run([*words, *asked], environ)
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    if done.returncode or int(macros.get("__cplusplus", "0").rstrip("L")) < 201707:
        said = next(iter((done.stderr.strip() or done.stdout.strip()).splitlines()), "nothing")
        raise BuildError(
            f"{f'CXX={text!r}' if text else words[0]} does not compile C++20 (it said: {said}); "
            f"it must be {WANTED}"
        )
    return macros


def _run(command, environ):
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, env=environ,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
