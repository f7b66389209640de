"""Invariants 1 and 2: the equations that every step obeys, on 1, 2 and 4 gloo workers."""

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.cases import WIRES
from support.problems import aggregate_of, flat, mean, memory_of, parameters, set_gradients
from support.workers import SIZES


def dense_equals_sgd(group, make, options, sgd_options):
    rank = dist.get_rank(group)
    params, twins = parameters(), parameters()
    optimizer = make(params, lr=0.1, density=1.0, process_group=group, **options)
    sgd = torch.optim.SGD(twins, lr=0.1, momentum=0.9, **sgd_options)
    for step in range(30):
        set_gradients(params, rank, step)
        set_gradients(twins, rank, step)
        for twin in twins:
            dist.all_reduce(twin.grad, group=group)
            twin.grad /= dist.get_world_size(group)
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=2e-6)
    assert flat(params).abs().max() > 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "make,options,sgd_options",
    [
        (gmc_cuda.GMC, {}, {}),
        (gmc_cuda.GMC, {"weight_decay": 0.05}, {"weight_decay": 0.05}),
        (
            gmc_cuda.GMC,
            {"nesterov": True, "weight_decay": 0.05},
            {"nesterov": True, "weight_decay": 0.05},
        ),
        (gmc_cuda.GMC, {"maximize": True}, {"maximize": True}),
        (gmc_cuda.DGC, {"weight_decay": 0.05}, {"weight_decay": 0.05}),
        (gmc_cuda.DGC, {"nesterov": True}, {"nesterov": True}),
    ],
)
def test_density_one_is_torch_sgd(pool, size, make, options, sgd_options):
    """Invariant 1."""
    pool.run(size, dense_equals_sgd, make, options, sgd_options)


NAN_STEPS = {20: 0, 21: 0, 90: 1, 150: 3}  # step: rank (modulo p) that meets a NaN


def check_equations(group, steps, options, drop_at, nan_steps, density_change=None):
    """Runs and checks both equations at every step, in float64, on every rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(
        params, lr=0.05, process_group=group, bucket_cap_mb=400 * 4 / 2**20, **options
    )
    group_options = optimizer.param_groups[0]
    beta, decay = group_options["momentum"], group_options["weight_decay"]
    iterate = group_options["momentum_form"] == "iterate"
    memory_decay, nesterov = group_options["memory_decay"], group_options["nesterov"]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [drop_at], gamma=0.1)
    assert len(optimizer.engine.buckets) > 1

    previous_lr, previous_move, stage = None, None, None
    a = torch.zeros_like(flat(params))
    for step in range(steps):
        if density_change and step == density_change[0]:
            group_options["density"] = density_change[1]
        lr = group_options["lr"]
        set_gradients(params, rank, step)
        nan = nan_steps.get(step)
        if nan is not None and nan % size == rank:
            params[2].grad[3, 4] = float("nan")
        gradient = mean(group, flat([p.grad.nan_to_num(0.0) for p in params]))
        w, ubar = flat(params), mean(group, memory_of(optimizer, params))
        before = aggregate_of(optimizer, params)
        assert torch.equal(before, a)

        optimizer.step()

        w_next, ubar_next = flat(params), mean(group, memory_of(optimizer, params))
        a = aggregate_of(optimizer, params)
        assert ubar_next.isfinite().all()
        r = previous_lr / lr if iterate and previous_lr is not None else 1.0
        came_in = memory_decay * ubar + gradient + decay * w + beta * r * before
        torch.testing.assert_close(ubar_next + a, came_in, rtol=1e-6, atol=1e-6)
        moved_by = (1 + beta) * a - beta * r * before if nesterov else a
        if nan is not None:
            assert torch.equal(w_next, w) and a.count_nonzero() == 0
        else:
            torch.testing.assert_close(w_next, w - lr * moved_by, rtol=1e-6, atol=1e-6)

        # The iterate without look-ahead. A skipped step does not take the look-ahead back.
        ahead = lr * beta if nesterov else 0.0
        y, y_next = w + ahead * r * before, w_next + ahead * a
        x, x_next = y - lr * ubar, y_next - lr * ubar_next
        if stage is None or stage[0] != lr:
            stage, drift = (lr, x.clone()), torch.zeros_like(x)
        holds = memory_decay == 1 and not (nesterov and nan_steps)
        if holds and previous_move is not None and (iterate or previous_lr == lr):
            predicted = x - lr * (gradient + decay * w) + beta * previous_move
            drift += x_next - predicted
            moved = (x_next - stage[1]).norm()
            assert drift.norm() <= 1e-5 * moved, f"step {step}: {drift.norm() / moved:.1e}"
        previous_move, previous_lr = y_next - y, lr
        scheduler.step()
    assert optimizer.stats()["skipped_steps"] == len(nan_steps)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["buffer", "iterate"])
@pytest.mark.parametrize("wire", WIRES)
def test_transformation_equation(pool, size, form, wire):
    """Invariant 2."""
    options = {"density": 0.05, "weight_decay": 0.01, "momentum_form": form, "wire_dtype": wire}
    pool.run(size, check_equations, 200, options, 120, NAN_STEPS)


@pytest.mark.parametrize("form", ["buffer", "iterate"])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_transformation_equation_with_nesterov(pool, form, density):
    """It holds for the iterate without look-ahead."""
    options = {"density": density, "weight_decay": 0.01, "momentum_form": form, "nesterov": True}
    pool.run(2, check_equations, 60, options, 30, {})


@pytest.mark.parametrize("form", ["buffer", "iterate"])
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize(
    "extra", [{"memory_decay": 0.95}, {"nesterov": True}, {"memory_decay": 0.5, "nesterov": True}]
)
def test_mass_with_memory_decay_and_nesterov(pool, form, density, extra):
    options = {"density": density, "weight_decay": 0.01, "momentum_form": form, **extra}
    pool.run(2, check_equations, 40, options, 25, {20: 0, 21: 0, 30: 1})


@pytest.mark.parametrize("density_change", [(30, 1.0), (30, 0.3)])
def test_transformation_equation_when_the_density_changes(pool, density_change):
    """From sparse to dense; and from dense, where that is cheaper, to sparse."""
    density = 0.05 if density_change[1] == 1.0 else 1.0
    options = {"density": density, "weight_decay": 0.01}
    if density == 1.0:
        density_change = (30, 0.05)
    pool.run(2, check_equations, 60, options, 50, {29: 1, 30: 0, 31: 0}, density_change)


def one_step_on_integers(group, make, density):
    """Invariant 6 through the optimizer: memory + p * aggregate = the gradients that came in."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params = parameters()
    optimizer = make(params, lr=1.0, density=density, process_group=group)
    start = flat(params)
    for param in params:
        torch.manual_seed(rank)
        param.grad = torch.randint(-50, 50, param.shape).float()
    came_in = mean(group, flat([p.grad for p in params])) * size
    optimizer.step()
    kept = mean(group, memory_of(optimizer, params)) * size
    sent = (start - flat(params)) * size
    torch.testing.assert_close(kept + sent, came_in, rtol=0, atol=1e-4)
    if make is gmc_cuda.GMC:
        assert torch.equal(kept + aggregate_of(optimizer, params) * size, came_in)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_nothing_is_lost_on_integers(pool, size, make, density):
    pool.run(size, one_step_on_integers, make, density)
