"""Saves in a background thread, and the report of failures that nobody has read."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future

_saves: list[Saving] = []


class Saving(Future[None]):
    """A save in the background. ``result()`` waits for its end, and raises if it failed."""

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
                "a save in the background has failed, and nobody has called its result(), so the "
                "newest checkpoint is an older one. Write\n"
                "    saved = gmc_cuda.checkpoint.save(folder, model, optimizer, wait=False)\n"
                "and, before the next save and at the end, saved.result(). It would have raised: "
                f"{error}",
                RuntimeWarning,
                stacklevel=8,  # the caller of save(), if there is one
            )


def run(work: Callable[[], None]) -> Saving:
    """Runs the work in a thread, for which the end of the interpreter waits."""
    saving = Saving()

    def work_and_report() -> None:
        try:
            work()
        except BaseException as error:
            saving.set_exception(error)
        else:
            saving.set_result(None)

    # The interpreter joins threads that are not daemons before it begins to shut down.
    threading.Thread(target=work_and_report, name="gmc_cuda.checkpoint", daemon=False).start()
    _saves.append(saving)
    return saving


def wait() -> None:
    """Waits for all saves."""
    for saving in _saves:
        saving.wait()


def finish() -> None:
    """Waits for all saves, and reports the failures that nobody has read."""
    while _saves:
        _saves[0].report()
        del _saves[0]


atexit.register(finish)
# A forked child has none of its parent's threads, and would wait for ever.
os.register_at_fork(after_in_child=_saves.clear)
