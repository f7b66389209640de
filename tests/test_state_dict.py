"""Saving and loading in the middle of a run."""

import io

import pytest
import torch
import torch.distributed as dist
from problems import parameters, set_gradients

import gmc_cuda


def resume(group, make, dtype, options):
    """Save at step 7, load into a new optimizer, continue: the same bits as without stopping."""
    rank = dist.get_rank(group)
    params = parameters(dtype)
    optimizer = make(params, lr=0.05, density=0.05, process_group=group, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for step in range(14):
        if step == 7:
            file = io.BytesIO()
            torch.save([params, optimizer.state_dict(), scheduler.state_dict()], file)
        set_gradients(params, rank, step)
        optimizer.step()
        scheduler.step()

    file.seek(0)
    saved, state, schedule = torch.load(file, weights_only=False)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved]
    optimizer2 = make(resumed, lr=1.0, process_group=group, **options)
    scheduler2 = torch.optim.lr_scheduler.StepLR(optimizer2, 5, gamma=0.5)
    optimizer2.load_state_dict(state)
    scheduler2.load_state_dict(schedule)
    for step in range(7, 14):
        set_gradients(resumed, rank, step)
        optimizer2.step()
        scheduler2.step()
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)
        assert optimizer2.state[b]["memory"].dtype == torch.float32
        assert torch.equal(optimizer.state[a]["memory"], optimizer2.state[b]["memory"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {}),
        (gmc_cuda.GMC, {"momentum_form": "iterate"}),
        (gmc_cuda.DGC, {}),
    ],
)
def test_resuming_gives_the_same_bits(pool, size, dtype, make, options):
    pool.run(size, resume, make, dtype, options)


def small(**options):
    return gmc_cuda.GMC([torch.nn.Parameter(torch.ones(4, 5))], lr=0.1, **options)


def test_state_holds_float32_memory_before_the_first_step():
    optimizer = gmc_cuda.GMC([torch.nn.Parameter(torch.ones(4, 5).bfloat16())], lr=0.1)
    (param,) = optimizer.param_groups[0]["params"]
    memory = optimizer.state[param]["memory"]
    assert memory.dtype == torch.float32 and memory.shape == param.shape
    assert optimizer.state_dict()["state"][0]["memory"].shape == param.shape


def test_layouts_need_not_match():
    """What was saved from a channels_last parameter loads into a contiguous one."""
    values = torch.randn(4, 3, 5, 5)
    params = [torch.nn.Parameter(values.to(memory_format=torch.channels_last)),
              torch.nn.Parameter(values.clone())]  # fmt: skip
    optimizers = [gmc_cuda.GMC([p], lr=0.1, density=0.1) for p in params]
    params[0].grad = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    states = [optimizers[i].state_dict()["state"][0] for i in (0, 1)]
    for name in ("memory", "aggregate_indices", "aggregate_values"):
        assert torch.equal(states[0][name], states[1][name])


def test_wrong_states_are_refused_and_change_nothing():
    optimizer = small()
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param]["memory"].fill_(3.0)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(4, 5))], lr=0.1, momentum=0.9)
    sgd.param_groups[0]["params"][0].grad = torch.ones(4, 5)
    sgd.step()
    with pytest.raises(ValueError, match="parameter 0 has no 'memory', but"):
        optimizer.load_state_dict(sgd.state_dict())
    other = gmc_cuda.GMC([torch.nn.Parameter(torch.ones(4, 6))], lr=0.1)
    with pytest.raises(ValueError, match=r"memory of parameter 0 has shape \(4, 6\), must be"):
        optimizer.load_state_dict(other.state_dict())
    assert (optimizer.state[param]["memory"] == 3.0).all()
