"""Invariants 1 and 2: the equations that every step obeys, on 1, 2 and 4 gloo workers."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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


SLOW = pytest.mark.slow


class Step(NamedTuple):
    """One step in float64; u and g are the means over the workers, a is what was applied."""

    number: int
    skipped: bool
    lr: float
    r: float  # eta_{t-1} / eta_t in iterate form, else 1
    g: Tensor
    w: Tensor
    u: Tensor
    a_before: Tensor
    w_next: Tensor
    u_next: Tensor
    a: Tensor


def train(group, optimizer, params, steps, drop_at, nan_steps, density_change):
    """Makes the steps one after the other; the learning rate drops once, the density may change."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    options = optimizer.param_groups[0]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [drop_at], gamma=0.1)
    previous_lr, a = None, torch.zeros_like(flat(params))
    for number in range(steps):
        if density_change and number == density_change[0]:
            options["density"] = density_change[1]
        set_gradients(params, rank, number)
        nan = nan_steps.get(number)
        if nan is not None and nan % size == rank:
            params[2].grad[3, 4] = float("nan")
        g = mean(group, flat([p.grad.nan_to_num(0.0) for p in params]))
        w, u = flat(params), mean(group, memory_of(optimizer, params))
        a_before, lr = aggregate_of(optimizer, params), options["lr"]
        assert torch.equal(a_before, a), "a has changed between two steps"
        optimizer.step()
        w_next, u_next = flat(params), mean(group, memory_of(optimizer, params))
        a = aggregate_of(optimizer, params)
        iterate = options["momentum_form"] == "iterate" and previous_lr is not None
        r = previous_lr / lr if iterate else 1.0
        yield Step(number, nan is not None, lr, r, g, w, u, a_before, w_next, u_next, a)
        scheduler.step()
        previous_lr = lr


def check_mass(step, options):
    """What stays and what is applied is what was there and what came in; a NaN counts as zero."""
    assert step.u_next.isfinite().all()
    came_in = options["memory_decay"] * step.u + step.g + options["weight_decay"] * step.w
    came_in += options["momentum"] * step.r * step.a_before
    torch.testing.assert_close(step.u_next + step.a, came_in, rtol=1e-6, atol=1e-6)


def check_move(step, options):
    """The weights move by lr * a; with nesterov the look-ahead moves along; skipped, not at all."""
    if step.skipped:
        assert torch.equal(step.w_next, step.w)
        assert step.a.count_nonzero() == 0
        return
    beta = options["momentum"]
    ahead = beta * (step.a - step.r * step.a_before) if options["nesterov"] else 0.0
    moved = step.lr * (step.a + ahead)
    torch.testing.assert_close(step.w_next, step.w - moved, rtol=1e-6, atol=1e-6)


class TransformedIterate:
    """x = y - lr * u makes dense momentum steps, y being the weights without look-ahead.

    In buffer form that holds between two changes of lr, in iterate form also over them. Its error
    is added up over the steps of one lr and compared with the way that x has gone.
    """

    def __init__(self, options):
        self.options = options
        self.lr = self.move = None

    def check(self, step):
        beta, form = self.options["momentum"], self.options["momentum_form"]
        ahead = step.lr * beta if self.options["nesterov"] else 0.0
        y, y_next = step.w + ahead * step.r * step.a_before, step.w_next + ahead * step.a
        x, x_next = y - step.lr * step.u, y_next - step.lr * step.u_next
        known = self.move is not None and (form == "iterate" or self.lr == step.lr)
        if self.lr != step.lr:
            self.start, self.drift = x, torch.zeros_like(x)
        if known:
            gradient = step.g + self.options["weight_decay"] * step.w
            self.drift += x_next - (x - step.lr * gradient + beta * self.move)
            off, moved = self.drift.norm(), (x_next - self.start).norm()
            assert off <= 1e-5 * moved, f"step {step.number}: {off / moved:.1e}"
        self.lr, self.move = step.lr, y_next - y


def check_equations(group, steps, options, drop_at, nan_steps, density_change=None):
    """Runs and checks the equations at every step, in float64, on every rank."""
    params = parameters()
    optimizer = gmc_cuda.GMC(
        params, lr=0.05, process_group=group, bucket_cap_mb=400 * 4 / 2**20, **options
    )
    assert len(optimizer.engine.buckets) > 1
    options = optimizer.param_groups[0]
    transformed = TransformedIterate(options)
    # Memory that decays is lost to x, and a skipped step does not take the look-ahead back.
    holds = options["memory_decay"] == 1 and not (options["nesterov"] and nan_steps)
    for step in train(group, optimizer, params, steps, drop_at, nan_steps, density_change):
        check_mass(step, options)
        check_move(step, options)
        if holds:
            transformed.check(step)
    assert optimizer.stats()["skipped_steps"] == len(nan_steps)


@pytest.mark.parametrize("size", [pytest.param(n, marks=SLOW if n != 2 else ()) for n in SIZES])
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
