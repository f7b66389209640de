"""NodeAverage on two nodes of two gloo workers, against the mass equation of a flat run."""

import functools

import pytest
import torch
import torch.distributed as dist
from problems import (
    aggregate_of,
    flat,
    mean,
    memory_of,
    parameters,
    same_on_all_ranks,
    set_gradients,
)
from torch.distributed.device_mesh import init_device_mesh

import gmc_cuda
from gmc_cuda import ops, wire


def gmc(**options):
    return functools.partial(gmc_cuda.GMC, lr=0.1, **options)


def whole(optimizer, share):
    """The node's shares, one after the other."""
    parts = [torch.empty_like(share) for _ in range(2)]
    dist.all_gather(parts, share, group=optimizer._inside)
    return torch.cat(parts)


def mass(group, density, nan_at):
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2))
    params = parameters()
    if rank > 0:
        with torch.no_grad():
            params[0].zero_()  # what rank 0 has counts
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=density), mesh)
    assert same_on_all_ranks(group, params)
    across, numel, own = mesh.get_group(0), flat(params).numel(), [optimizer._own]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for step in range(10):
        optimizer.zero_grad()
        set_gradients(params, rank, step)
        gradient = mean(group, flat([p.grad for p in params]))
        if step == nan_at and rank == 3:
            params[-1].grad[0, 0] = torch.nan
        lr = optimizer.param_groups[0]["lr"]
        w = flat(params)
        before = whole(optimizer, aggregate_of(optimizer.inner, own))[:numel]
        ubar = whole(optimizer, mean(across, memory_of(optimizer.inner, own)))[:numel]
        optimizer.step()
        a = whole(optimizer, aggregate_of(optimizer.inner, own))[:numel]
        left = whole(optimizer, mean(across, memory_of(optimizer.inner, own)))[:numel] + a
        assert same_on_all_ranks(group, params)
        if step == nan_at:
            assert torch.equal(flat(params), w) and a.count_nonzero() == 0
        else:
            torch.testing.assert_close(left, ubar + gradient + 0.9 * before, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(flat(params), w - lr * a, rtol=1e-6, atol=1e-6)
        schedule.step()
    return optimizer.stats()["bytes_per_step"]


@pytest.mark.parametrize("nan_at", [None, 4])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_mass_equation_and_bytes_across(pool, density, nan_at):
    sent = pool.run(4, mass, density, nan_at)
    numel = sum(p.numel() for p in parameters())
    k = wire.entries_at(0.05, numel)
    if density == 0.05:  # two workers of a node send what a flat one would, and a header
        assert sent[0] + sent[1] <= ops.payload_nbytes(numel, k, torch.bfloat16) + 96


def resumed(group):
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2))

    def train(params, optimizer, steps):
        for step in steps:
            set_gradients(params, rank, step)
            optimizer.step()

    params = parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    train(params, optimizer, range(4))
    weights = [p.detach().clone() for p in params]
    state = optimizer.state_dict()
    state["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()}
    train(params, optimizer, range(4, 8))
    others = parameters()
    again = gmc_cuda.NodeAverage(others, gmc(density=0.05), mesh)
    with torch.no_grad():
        for p, weight in zip(others, weights, strict=True):
            p.copy_(weight)
    again.load_state_dict(state)
    train(others, again, range(4, 8))
    assert torch.equal(flat(params), flat(others))


def test_save_and_load(pool):
    pool.run(4, resumed)


def test_wrong_uses():
    with pytest.raises(ValueError, match="mesh: got None, must be a 2-D device mesh"):
        gmc_cuda.NodeAverage(parameters(), gmc(), None)
