import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import parameters, same_on_all_ranks, set_gradients


def optimizer_with(*densities):
    groups = [{"params": [torch.nn.Parameter(torch.ones(50))], "density": d} for d in densities]
    return gmc_cuda.GMC(groups, lr=0.1)


def test_warmup_is_that_of_the_paper():
    optimizer = optimizer_with(0.001)
    warmup = gmc_cuda.DensityWarmup(optimizer, 4)
    seen = [optimizer.param_groups[0]["density"]]
    for _ in range(6):
        warmup.step()
        seen.append(optimizer.param_groups[0]["density"])
    assert seen[:5] == pytest.approx([0.25, 0.0629, 0.0158, 0.00398, 0.001], rel=0.01)
    assert seen[4:] == [0.001] * 3
    assert warmup.get_last_density() == [0.001]


def test_dense_groups_stay_dense():
    optimizer = optimizer_with(0.01, 1.0, 0.5)
    warmup = gmc_cuda.DensityWarmup(optimizer, 2, initial_density=0.5)
    assert [g["density"] for g in optimizer.param_groups] == [0.5, 1.0, 0.5]
    warmup.step()
    assert warmup.get_last_density() == pytest.approx([0.0707, 1.0, 0.5], rel=0.01)


def test_saved_and_loaded():
    warmup = gmc_cuda.DensityWarmup(optimizer_with(0.01), 5)
    for _ in range(3):
        warmup.step()
    other = optimizer_with(0.01)
    resumed = gmc_cuda.DensityWarmup(other, 5)
    resumed.load_state_dict(warmup.state_dict())
    assert other.param_groups[0]["density"] == warmup.get_last_density()[0]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_warmup_steps(steps):
    with pytest.raises(ValueError, match="warmup_steps: got"):
        gmc_cuda.DensityWarmup(optimizer_with(0.01), steps)


def test_other_arguments():
    with pytest.raises(ValueError, match="initial_density: got 0"):
        gmc_cuda.DensityWarmup(optimizer_with(0.01), 3, 0)
    with pytest.raises(TypeError, match="optimizer: got SGD without a density"):
        gmc_cuda.DensityWarmup(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 3)


def train(group):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.05, process_group=group)
    warmup = gmc_cuda.DensityWarmup(optimizer, 4)
    sent = []
    for step in range(12):
        set_gradients(params, rank, step)
        optimizer.step()
        sent.append(optimizer.stats()["bytes_per_step"])
        warmup.step()
    assert sent[0] > sent[1] > sent[2] > sent[4] == sent[11]
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("size", [1, 2])
def test_training_through_a_warmup(pool, size):
    pool.run(size, train)
