from pathlib import Path

import pytest

from emulator.compilation import compiler

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    if compiler() is None:
        skip = pytest.mark.skip(reason="no GCC (set CXX to its g++): kernels cannot run on the CPU")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
