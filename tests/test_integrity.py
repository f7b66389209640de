"""What a run must not go on without noticing."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from problems import parameters, set_gradients

import gmc_cuda
from gmc_cuda import ops
from gmc_cuda.integrity import DamageWatch

# ------------------------------------------------ damaged payloads, with stand-ins for CUDA events


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


# ---------------------------------------------------------------------- workers that send the same


def same_data(group, same, density):
    """All ranks have rank 0's gradients, as behind DistributedDataParallel, or their own."""
    rank = 0 if same else dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=density, process_group=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # payloads of zeros say nothing
        for step in range(8):
            set_gradients(params, rank, step)
            optimizer.step()
    return [str(w.message) for w in caught if "gmc_cuda" in str(w.message)]


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_duplicated_data_is_warned_about_once(pool, density):
    for texts in pool.run(2, same_data, True, density):
        (text,) = texts
        assert "all 2 workers sent the same payload in 3 steps" in text
        assert "gmc_cuda.local_gradients(ddp_model)" in text and "DistributedSampler" in text
    assert pool.run(2, same_data, False, density) == [[], []]
    assert pool.run(1, same_data, True, density) == [[]]


# ---------------------------------------------------------------------------- replicas that differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_counts_in_a_fingerprint(dtype):
    params = [torch.randn(n).to(dtype) for n in (1, 7, 64, 1000, 70_001)]
    prints = ops.fingerprint(params)
    assert torch.equal(prints, ops.fingerprint(copy.deepcopy(params)))
    assert torch.equal(prints, torch.cat([ops.fingerprint([p]) for p in params]))
    for i in (1, 3, 4):
        changed = copy.deepcopy(params)
        bits = changed[i].view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits[5] ^= 1
        differs = ops.fingerprint(changed) != prints
        assert differs.tolist() == [j == i for j in range(len(params))]
        bits[5] ^= 1
        bits[[2, 3]] = bits[[3, 2]]  # the same bits in another order
        assert ops.fingerprint(changed)[i] != prints[i]


def drift(group, every):
    rank = dist.get_rank(group)
    named = [(f"layer{i}", p) for i, p in enumerate(parameters())]
    params = [p for _, p in named]
    optimizer = gmc_cuda.GMC(named, lr=0.1, process_group=group, check_replicas_every=every)
    for step in range(6):
        set_gradients(params, rank, step)
        if step == 4 and rank == 2:
            params[3].data.view(torch.int32).view(-1)[5] ^= 1
        if every and step == 5:
            words = (
                r"after step 6: parameter 3 \('layer3'\) of group 0 has other bits on rank 2 than"
            )
            with pytest.raises(RuntimeError, match=words):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("every", [0, 3])
def test_replicas_that_differ_raise_on_every_rank(pool, every):
    pool.run(4, drift, every)
