"""LocalUpdates: rounds of inner steps, against closed forms, with any inner optimizer."""

import functools
import warnings
from copy import deepcopy

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

import gmc_cuda

H = 3


def gmc(group, **options):
    return functools.partial(gmc_cuda.GMC, process_group=group, **options)


def with_dense_outer(group, nesterov):
    """An outer dense SGD written out by torch.optim.SGD on the averaged differences."""
    rank = dist.get_rank(group)
    params, twins = parameters(), parameters()
    options = {"lr": 0.7, "momentum": 0.9, "nesterov": nesterov}
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.AdamW(params, lr=0.01), gmc(group, density=1.0, **options), H
    )
    inner = torch.optim.AdamW(twins, lr=0.01)
    starts = [torch.nn.Parameter(t.detach().clone()) for t in twins]
    outer = torch.optim.SGD(starts, **options)
    for step in range(4 * H):
        set_gradients(params, rank, step)
        set_gradients(twins, rank, step)
        optimizer.step()
        inner.step()
        if (step + 1) % H == 0:
            for start, twin in zip(starts, twins, strict=True):
                start.grad = mean(group, start.detach() - twin.detach())
            outer.step()
            with torch.no_grad():
                for start, twin in zip(starts, twins, strict=True):
                    twin.copy_(start)
            assert same_on_all_ranks(group, params)
        else:
            assert not same_on_all_ranks(group, params)
        torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_dense_outer_is_torch_sgd_on_averaged_differences(pool, nesterov):
    pool.run(2, with_dense_outer, nesterov)


def late(group, density):
    """overlap: a round's moves are applied one round later; until then each worker keeps its."""
    rank = dist.get_rank(group)
    params = parameters()
    options = {"lr": 0.7, "momentum": 0.5, "density": density}
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.01), gmc(group, **options), H, overlap=True
    )
    twins = parameters()
    inner = torch.optim.SGD(twins, lr=0.01)
    starts = [torch.nn.Parameter(t.detach().clone()) for t in twins]
    outer = gmc(group, **options)(starts)
    own = [torch.zeros_like(t) for t in twins]  # what is on its way
    for step in range(5 * H):
        set_gradients(params, rank, step)
        set_gradients(twins, rank, step)
        optimizer.step()
        inner.step()
        if (step + 1) % H:
            continue
        with torch.no_grad():
            moved = [s - o - t for s, o, t in zip(starts, own, twins, strict=True)]
        if step >= H:  # the round before has arrived
            for start, sent in zip(starts, own, strict=True):
                start.grad = sent
            outer.step()
        own = moved
        with torch.no_grad():
            for twin, start, sent in zip(twins, starts, own, strict=True):
                twin.copy_(start - sent)
        assert torch.equal(flat(params), flat(twins))
        assert same_on_all_ranks(group, optimizer.outer.param_groups[0]["params"])
        assert not same_on_all_ranks(group, params)
    with pytest.raises(RuntimeError, match=r"call optimizer.synchronize\(\) on all workers before"):
        optimizer.state_dict()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    assert torch.equal(flat(params), flat(optimizer.outer.param_groups[0]["params"]))
    optimizer.state_dict()


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_overlap_is_one_round_late(pool, density):
    pool.run(2, late, density)


def mass(group, decay):
    """ubar + a_t = d * ubar + mean(w - w_k) + beta * a_{t-1}, for the outer optimizer."""
    rank = dist.get_rank(group)
    params = parameters(torch.bfloat16)
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.AdamW(params, lr=0.01),
        gmc(group, lr=0.7, momentum=0.5, density=0.05, memory_decay=decay),
        H,
    )
    outer, start = optimizer.outer, optimizer.outer.param_groups[0]["params"]
    for step in range(5 * H):
        set_gradients(params, rank, step)
        optimizer.inner.step()  # what LocalUpdates does, looked at from outside
        moved = flat([s.to(torch.bfloat16) for s in start]) - flat(params)
        before = mean(group, memory_of(outer, start)), aggregate_of(outer, start)
        w = flat(start)
        optimizer._steps += 1
        if optimizer._steps % H == 0:
            optimizer._end_round()
            ubar, a = mean(group, memory_of(outer, start)), aggregate_of(outer, start)
            came = decay * before[0] + mean(group, moved) + 0.5 * before[1]
            torch.testing.assert_close(ubar + a, came, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(flat(start), w - 0.7 * a, rtol=1e-6, atol=1e-6)
            assert torch.equal(flat(params), flat([s.to(torch.bfloat16) for s in start]))
            assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_mass_equation_of_the_outer_optimizer(pool, decay):
    pool.run(2, mass, decay)


def resumed(group, stop):
    rank = dist.get_rank(group)

    def start():
        params = parameters()
        inner = torch.optim.AdamW(params, lr=0.01)
        return params, gmc_cuda.LocalUpdates(inner, gmc(group, lr=0.7, density=0.05), H)

    def train(params, optimizer, steps):
        for step in steps:
            set_gradients(params, rank, step)
            optimizer.step()

    params, optimizer = start()
    train(params, optimizer, range(stop))
    weights, saved = deepcopy(params), deepcopy(optimizer.state_dict())
    train(params, optimizer, range(stop, 12))
    others, again = start()
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    again.load_state_dict(saved)
    again.load_state_dict(again.state_dict())  # as Accelerate does
    train(others, again, range(stop, 12))
    assert torch.equal(flat(params), flat(others))


@pytest.mark.parametrize("stop", [2 * H, 2 * H + 1])
def test_save_and_load_continue_bit_for_bit(pool, stop):
    pool.run(2, resumed, stop)


def overflowing(group):
    """A worker whose inner step a GradScaler leaves out still takes part in the exchange."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), gmc(group, lr=0.7), H)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for step in range(2 * H):
        set_gradients(params, rank, step)
        gradient, before = params[1].grad.clone(), params[1].detach().clone()
        params[1].grad.mul_(scaler.get_scale())
        if step == 1 and rank == 1:
            params[1].grad[0] = torch.inf
        scaler.step(optimizer)
        if (step + 1) % H:
            left_out = step == 1 and rank == 1
            moved = torch.zeros_like(before) if left_out else -0.1 * gradient
            torch.testing.assert_close(params[1].detach() - before, moved)
        scaler.update()
    assert same_on_all_ranks(group, params)
    assert optimizer.stats()["steps"] == 2


def test_grad_scaler_on_one_worker_only(pool):
    pool.run(2, overflowing)


def test_schedulers_and_the_optimizer_protocol():
    params = parameters()
    inner = torch.optim.AdamW(params, lr=0.01)
    optimizer = gmc_cuda.LocalUpdates(inner, every=H)
    assert isinstance(optimizer, torch.optim.Optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        calls = []
        optimizer.register_step_post_hook(lambda *args: calls.append(1))
        for step in range(5):
            set_gradients(params, 0, step)
            optimizer.step(lambda: torch.tensor(1.0))
            scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.01 * 0.25
    assert len(calls) == 5
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert optimizer.state is inner.state
    assert optimizer.outer.param_groups[0]["density"] == gmc_cuda.LocalUpdates.DEFAULTS["density"]
    assert optimizer.stats()["steps"] == 1


def test_synchronize_ends_a_round():
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.1), functools.partial(gmc_cuda.GMC, lr=1.0, density=1.0), H
    )
    set_gradients(params, 0, 0)
    optimizer.step()
    optimizer.synchronize()
    optimizer.synchronize()
    assert optimizer.stats()["steps"] == 1
    assert torch.equal(flat(params), flat(optimizer.outer.param_groups[0]["params"]))


def disagreeing(group):
    every = 2 + dist.get_rank(group)
    with pytest.raises(ValueError, match="every: 2 on rank 0, 3 on rank 1"):
        gmc_cuda.LocalUpdates(torch.optim.SGD(parameters(), 0.1), gmc(group, lr=0.7), every)


def test_workers_that_differ(pool):
    pool.run(2, disagreeing)


def test_wrong_uses():
    params = parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(TypeError, match=r"must be what makes one .*partial\(gmc_cuda.GMC, lr=0.7"):
        gmc_cuda.LocalUpdates(inner, gmc_cuda.GMC(params, 0.7))
    with pytest.raises(TypeError, match="it made a SGD, must make a gmc_cuda.GMC or DGC"):
        gmc_cuda.LocalUpdates(inner, functools.partial(torch.optim.SGD, lr=0.7))
    for every in (0, 2.0, True):
        with pytest.raises(ValueError, match="every: got .*at least 1"):
            gmc_cuda.LocalUpdates(inner, every=every)
    optimizer = gmc_cuda.LocalUpdates(inner)
    with pytest.raises(ValueError, match="got the state of an inner optimizer alone"):
        optimizer.load_state_dict(inner.state_dict())
    with pytest.raises(NotImplementedError, match="construct the inner optimizer with all"):
        optimizer.add_param_group({"params": parameters()})
