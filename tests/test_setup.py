"""The Makefile's environment, on machines whose python3 has what is needed and no network."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make(folder, *arguments, hidden=(), **variables):
    """Runs make for this Python in `folder`, with no package index to reach.

    Args:
        hidden: modules that no Python which make starts can import.
    """
    hiding = folder / "hiding"
    hiding.mkdir(exist_ok=True)
    for name in hidden:
        (hiding / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    (hiding / "ninja").write_text("#!/bin/sh\n")  # so that none is asked for
    (hiding / "ninja").chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    environment = {**os.environ, "PYTHONPATH": str(hiding), **offline}
    environment["PATH"] = f"{hiding}{os.pathsep}{os.environ['PATH']}"
    settings = {"PYTHON": sys.executable, "VENV": "venv", "TORCH": "", **variables}
    return subprocess.run(
        ["make", "-f", ROOT / "Makefile", *(f"{n}={v}" for n, v in settings.items()), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def project(folder, **lists):
    """A pyproject.toml in `folder` that asks for these packages."""
    lines = [f"{name} = {json.dumps(packages)}\n" for name, packages in lists.items()]
    (folder / "pyproject.toml").write_text("".join(lines))


def ask(folder, question):
    """What the environment in `folder` prints for this Python expression."""
    code = f"import importlib.util, sys; print({question})"
    command = [str(folder / "venv/bin/python"), "-c", code]
    return subprocess.run(
        command, cwd="/", capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), ("ensurepip",), ("ensurepip", "pip")], ids=str)
def test_what_python3_has_is_used_without_a_network(tmp_path, hidden):
    version = importlib.metadata.version("torch").split("+")[0]
    project(tmp_path, demo=["pytest"], dependencies=[f"torch>={version}"], requires=["hypothesis"])
    done = make(tmp_path, "venv/demo.installed", "venv/build.installed", hidden=hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("nothing is installed" in done.stdout) == ("pip" in hidden)
    assert ask(tmp_path, "sys.prefix") == str(tmp_path / "venv")
    for name in ("torch", "pytest"):
        found = ask(tmp_path, f"importlib.util.find_spec({name!r}).origin")
        assert found == importlib.util.find_spec(name).origin
    assert str(tmp_path) in ask(tmp_path, "sys.path")  # where gmc_cuda is, in the repository


def test_a_package_that_cannot_be_had_is_an_error(tmp_path):
    project(tmp_path, demo=["pytest>=10000"])
    done = make(tmp_path, "venv/demo.installed")
    assert done.returncode != 0
    assert "No matching distribution found for pytest>=10000" in done.stderr
    assert "If this machine has no network" in done.stdout
    assert not (tmp_path / "venv/demo.installed").exists()


@pytest.mark.slow
def test_a_torch_of_ones_own_hides_that_of_python3(tmp_path):
    project(tmp_path, demo=[])
    done = make(tmp_path, "venv/created", TORCH="torch==2.13.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ask(tmp_path, "importlib.util.find_spec('torch')") == "None"


@pytest.mark.slow
def test_another_torch_is_installed_when_it_is_asked_for(tmp_path):
    project(tmp_path, dependencies=["pytest"], requires=["hypothesis"])
    assert make(tmp_path, "venv/build.installed").returncode == 0
    assert "is up to date" in make(tmp_path, "venv/build.installed").stdout
    done = make(tmp_path, "venv/build.installed", TORCH="no-such-torch==1.0")
    assert "No matching distribution found for no-such-torch==1.0" in done.stderr


def test_make_reads_every_list_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = {
        "requires": content["build-system"]["requires"],
        "dependencies": content["project"]["dependencies"],
        **content["project"]["optional-dependencies"],
    }
    show = "show:;@printf '%s\\n' " + " / ".join(f"$(call listed,{name})" for name in lists)
    command = ["make", "-s", "--no-print-directory", f"--eval={show}", "show"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    read = [group.split() for group in re.split(r"\n/\n", done.stdout)]
    assert read == [[*packages] for packages in lists.values()]


def test_every_folder_of_the_package_is_installed():
    setuptools = pytest.importorskip("setuptools")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    files = (ROOT / "gmc_cuda").rglob("*.py")
    assert set(found) == {".".join(file.parent.relative_to(ROOT).parts) for file in files}
