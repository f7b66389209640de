"""The virtual environment behind the Makefile.

python3 make_venv.py create .venv      make it; if this python3 has torch, its packages can be
                                       seen in there (so nothing is downloaded twice, and it
                                       works without a network)
.venv/bin/python make_venv.py fill demo test
                                       install what pyproject.toml asks for and is not there:
                                       what every build needs, and these extras
"""

import argparse
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent / "pyproject.toml"


def create(folder, own_torch):
    """Makes the environment in `folder`; with `own_torch` it sees nothing of this Python's."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whatever python3 there is runs this
        sys.exit(f"Python 3.10 or later is needed, python3 is {sys.version}; see make PYTHON=...")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", folder]).returncode:
        sys.exit(f"{sys.executable} could not make a virtual environment (see above)")
    python = Path(folder, "bin", "python")
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = ""
    if own_torch or not version or [int(n) for n in version.split(".")[:2]] < [2, 11]:
        return
    # --system-site-packages would not do: python3 may itself be in a virtual environment, and
    # then its packages are not the system's.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    visible = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    Path(inside.stdout.strip(), "packages_of_python3.pth").write_text("\n".join(visible) + "\n")
    # The one that came with the environment is old and would hide python3's.
    pip(python, "uninstall", "--yes", "setuptools")
    print(f"{folder} sees the packages of {sys.executable} (torch {version})")


def fill(extras, torch):
    """Installs into the running environment what is not there yet."""
    from pip._vendor.packaging.requirements import Requirement

    project = read_pyproject()
    extra_requirements = project["project"]["optional-dependencies"]
    if extras == ["lint"]:  # tools that are started by their path, so a borrowed one is no use
        wanted, options = (
            project["project"]["optional-dependencies"]["lint"],
            ["--ignore-installed"],
        )
    else:
        wanted = [torch] if torch else project["project"]["dependencies"]
        wanted = wanted + project["build-system"]["requires"]
        wanted += [] if shutil.which("ninja") else ["ninja"]
        for extra in extras:
            wanted += extra_requirements[extra]
        options = []
    missing = []
    for requirement in dict.fromkeys(wanted):
        parsed = Requirement(requirement)
        try:
            found = metadata.version(parsed.name)
        except metadata.PackageNotFoundError:
            found = None
        if options or found is None or not parsed.specifier.contains(found, prereleases=True):
            missing.append(requirement)
    if not missing:
        return
    note = " (torch can be several GB)" if any(m.startswith("torch") for m in missing) else ""
    print(f"Installing {', '.join(missing)}{note}", flush=True)
    if not pip(sys.executable, "install", *options, *missing):
        sys.exit(
            f"\nCould not install {', '.join(missing)} (see above). If this machine has no network,"
            "\ninstall them for python3 by other means: what it has is used as it is."
        )


def read_pyproject():
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))


def pip(python, *arguments):
    """Runs pip, quietly; returns whether it went well."""
    quiet = ["--quiet", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([python, "-m", "pip", *quiet, *arguments]).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    creating = commands.add_parser("create")
    creating.add_argument("folder")
    filling = commands.add_parser("fill")
    filling.add_argument("extras", nargs="*")
    for command in (creating, filling):
        command.add_argument("--torch", default="", help="this torch, not one that is there")
    given = parser.parse_args()
    if given.command == "create":
        create(given.folder, own_torch=bool(given.torch))
    else:
        fill(given.extras, given.torch)


if __name__ == "__main__":
    main()
