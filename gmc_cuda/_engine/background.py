"""Saves that go on beside the training, and what becomes of them if nobody asks."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future

_saves: list[Saving] = []


class Saving(Future[None]):
    """A save on its way. ``result()`` waits for its end, and raises if it failed."""

    def __init__(self) -> None:
        super().__init__()
        self._was_read = False

    def result(self, timeout: float | None = None) -> None:
        self._read(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._read(timeout)
        return super().exception(0)

    def _read(self, timeout: float | None) -> None:
        super().exception(timeout)
        self._was_read = True

    def wait(self) -> None:
        super().exception()

    def report(self) -> None:
        """Waits, and warns about a failure that nobody has read."""
        error = super().exception()
        if error is not None and not self._was_read:
            self._was_read = True
            warnings.warn(
                "a save in the background has failed, and nobody has asked its result(), so the "
                "newest checkpoint is an older one. Write\n"
                "    saved = gmc_cuda.checkpoint.save(folder, model, optimizer, wait=False)\n"
                "and, before the next save and at the end, saved.result(). It would have raised: "
                f"{error}",
                RuntimeWarning,
                stacklevel=8,  # of who calls save(); at the end of the interpreter nobody does
            )


def run(work: Callable[[], None]) -> Saving:
    """Runs it in a thread that the end of the interpreter waits for."""
    saving = Saving()

    def work_and_report() -> None:
        try:
            work()
        except BaseException as error:
            saving.set_exception(error)
        else:
            saving.set_result(None)

    # Not a daemon: threads that are not are joined before anything of the interpreter ends.
    threading.Thread(target=work_and_report, name="gmc_cuda.checkpoint", daemon=False).start()
    _saves.append(saving)
    return saving


def wait() -> None:
    """Waits for the saves that were started."""
    for saving in _saves:
        saving.wait()


def finish() -> None:
    """Waits for the saves that were started, and reports those whose failure nobody has read."""
    while _saves:
        _saves[0].report()
        del _saves[0]


atexit.register(finish)
# The threads stay with the parent, so a child would wait for ever.
os.register_at_fork(after_in_child=_saves.clear)
