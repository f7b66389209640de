from pathlib import Path

import pytest

from emulator.compilation import compiler

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """Kernels under a sanitizer are slow; the executor itself rarely changes."""
    skip = pytest.mark.skip(reason="no GCC (set CXX to its g++): kernels cannot run on the CPU")
    for item in items:
        if HERE not in item.path.parents:
            continue
        if compiler() is None:
            item.add_marker(skip)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        of_executor = item.path.stem in ("test_executor", "test_early_starts")
        if parameters.get("running", "plain") != "plain" or of_executor:
            item.add_marker(pytest.mark.slow)
