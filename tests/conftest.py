import os

import hypothesis
import pytest
import torch

from support.workers import WorkerPool

hypothesis.settings.register_profile("gmc_cuda", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gmc_cuda")

# A make that a test starts is not to get the variables of the one that started the tests.
for name in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def pool():
    """Gloo workers, started at the first use."""
    workers = WorkerPool()
    yield workers
    workers.stop()


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tests of threads set their own number


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = "no CUDA device: " + (
        "this torch is built without CUDA" if torch.version.cuda is None else "none is visible"
    )
    for item in items:
        if item.get_closest_marker("gpu"):  # not keywords, which hold the names of folders too
            item.add_marker(pytest.mark.skip(reason=reason))
