"""Other tests of the package, run on the CUDA kernels through the operators that users call."""

import pytest

from emulator.whole_library import copy_repository, pytest_there
from gmc_cuda import ops


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole_library")
    copy_repository(folder)
    on_the_cpu = ops.select_state(1000, 10, "cpu").numel()
    (folder / "tests" / "test_which.py").write_text(
        "from gmc_cuda import ops\n"
        "def test_which():\n"
        f"    assert ops.select_state(1000, 10, 'cpu').numel() > 100 * {on_the_cpu}\n"
    )
    return folder


def passes(there, *arguments):
    status, printed = pytest_there(there, "-q", "-x", *arguments)
    assert status == 0, printed[-5000:]
    assert " passed" in printed


def test_optimizers(there):
    passes(there, "tests/test_which.py", "tests/test_optim.py", "-m", "not slow")


def test_damage_on_the_way_to_an_owner_and_back(there):
    """A GPU tells it a step later, so no other run meets what the package does then."""
    passes(there, "tests/test_two_sided.py", "-k", "damage")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ("test_equations.py", "not iterate"),  # that form is the host's
        ("test_two_sided.py", "not damage"),  # see above
        ("test_ops.py", "compress_equals or oracle or merge"),
        ("test_checkpoint.py", "resuming or format_2"),
        ("test_demo.py", "text_with_every_method"),
    ],
)
def test_more(there, files, chosen):
    passes(there, f"tests/{files}", "-k", chosen, "-m", "not slow")
