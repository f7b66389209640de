"""The watch over flags of damaged payloads, with stand-ins for the device's events."""

import pytest
import torch

from gmc_cuda.integrity import DamageWatch


class Event:
    def __init__(self, done):
        self.done = done

    def query(self):
        return self.done


def flags(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return DamageWatch()


def test_a_damaged_step_raises_once_it_has_ended(watch):
    event = Event(done=False)
    watch._waiting.append((Event(done=True), flags(0, 1)))
    watch._waiting.append((event, flags(0, 2)))
    watch.check(rank=3)
    assert len(watch._waiting) == 1
    event.done = True
    with pytest.raises(RuntimeError, match="rank 3 received a damaged payload in an earlier step"):
        watch.check(rank=3)
    watch.check(rank=3)


def test_nothing_is_asked_during_a_capture(watch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watch._waiting.append((Event(done=True), flags(2)))
    watch.check(rank=0)
    assert len(watch._waiting) == 1
