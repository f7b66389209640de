"""A disk that is full for one worker."""

import resource
import signal
from contextlib import contextmanager

import pytest

from gmc_cuda import checkpoint


@contextmanager
def full_disk(room):
    """No file may grow beyond this many bytes, once the workers have met for a checkpoint.

    They meet in the store of their group, which is a file in most tests and would be full as well.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before, meet = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), checkpoint.meeting.meet

    def meet_and_fill(*args):
        meet(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.meeting, "meet", meet_and_fill)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
