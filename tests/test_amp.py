"""Loss scaling: workers skip and change their scale together, and memory never sees the scale."""

import copy
import itertools
import pickle
import random

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import flat, memory_of, parameters, same_on_all_ranks, set_gradients

STEPS = 50
GROWTH = 3  # steps without an overflow after which the scale doubles
SCALE = 2.0**10


def scaler_of(**options):
    options = {"init_scale": SCALE, "growth_interval": GROWTH, **options}
    return gmc_cuda.GradScaler("cpu", **options)


def without_gradients(rank, step, size):
    """The last rank now and then has none at all."""
    return rank == size - 1 and step % 7 == 3


def overflowing(step, size):
    """The ranks whose gradient overflows: none, one or more."""
    draw = random.Random(step)
    met = [rank for rank in range(size) if draw.random() < 0.3 / size**0.5]
    return [rank for rank in met if not without_gradients(rank, step, size)]


def expected_scales(size):
    """What every rank's scale must be before each step, by torch's rule on the common verdict."""
    scales, clean = [SCALE], 0
    for step in range(STEPS):
        clean = 0 if overflowing(step, size) else clean + 1
        factor = 0.5 if clean == 0 else 2.0 if clean == GROWTH else 1.0
        scales.append(scales[-1] * factor)
        clean %= GROWTH
    assert {b / a for a, b in itertools.pairwise(scales)} == {0.5, 1.0, 2.0}
    return scales


def set_scaled(params, scaler, rank, step):
    """What backward() of a scaled loss leaves. The scale is a power of two, so nothing rounds."""
    set_gradients(params, rank, step)
    for param in params:
        param.grad = scaler.scale(param.grad)


def put_nan(params):
    """A gradient that counts as zero and as not finite."""
    for param in params:
        param.grad = torch.zeros_like(param)
    params[0].grad[0, 0] = float("nan")


def compare(group, make, options, way):
    """With a scaler the same bits as without one, where an overflowed gradient counts as zero."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params, twins = parameters(), parameters()
    options = {"lr": 0.05, "weight_decay": 0.01, "process_group": group, **options}
    optimizer, twin = make(params, **options), make(twins, **options)
    scaler = scaler_of()
    expected = expected_scales(size)
    for step in range(STEPS):
        own = torch.tensor([scaler.get_scale()])
        scales = [torch.zeros(1) for _ in range(size)]
        dist.all_gather(scales, own, group=group)
        assert scales == [torch.tensor([expected[step]])] * size
        if without_gradients(rank, step, size):
            for param in params + twins:
                param.grad = None
        else:
            set_scaled(params, scaler, rank, step)
            set_gradients(twins, rank, step)
        overflow = rank in overflowing(step, size)
        if overflow:
            params[step % 6].grad.view(-1)[0] = float("inf")
        if way == "clip":
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
            assert norm.isfinite() != overflow
            torch.nn.utils.clip_grad_norm_(twins, 2.0)
        if overflow:
            put_nan(twins)
        assert scaler.step(optimizer) is None
        scaler.update()
        twin.step()
        assert torch.equal(memory_of(optimizer, params), memory_of(twin, twins))
        assert torch.equal(flat(params), flat(twins))
    assert same_on_all_ranks(group, params)
    skipped = sum(bool(overflowing(step, size)) for step in range(STEPS))
    assert optimizer.stats()["skipped_steps"] == skipped > 5
    assert scaler.get_scale() == expected[-1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", ["plain", "clip"])
@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {"density": 0.1}),
        (gmc_cuda.GMC, {"density": 1.0}),
        (gmc_cuda.DGC, {"density": 0.1, "clip_norm": 3.0}),
    ],
)
def test_workers_skip_and_scale_together(pool, size, way, make, options):
    pool.run(size, compare, make, options, way)


def scaled_step(params, optimizer, scaler, rank, step, overflow=False):
    set_scaled(params, scaler, rank, step)
    if overflow:
        params[1].grad[0] = float("-inf")
    scaler.step(optimizer)


def two_optimizers(group):
    """One scaler for both; only one of them overflows, on one rank."""
    rank = dist.get_rank(group)
    params = parameters()
    first, second = [
        gmc_cuda.GMC(part, lr=0.05, density=0.1, process_group=group)
        for part in (params[:3], params[3:])
    ]
    scaler = scaler_of()
    for step in range(6):
        set_scaled(params, scaler, rank, step)
        if step == 2 and rank == 1:
            params[4].grad[0] = float("inf")
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        assert scaler.get_scale() == SCALE * [1, 1, 0.5, 0.5, 0.5, 1][step]
    assert (first.stats()["skipped_steps"], second.stats()["skipped_steps"]) == (0, 1)
    assert same_on_all_ranks(group, params)


def test_two_optimizers_with_one_scaler(pool):
    pool.run(2, two_optimizers)


def save_and_resume(group, way):
    """The scaler's state goes on, in the middle of its count of clean steps."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.05, density=0.1, process_group=group)
    scaler = scaler_of()
    for step in range(5):
        scaled_step(params, optimizer, scaler, rank, step, overflow=step == 2 and rank == 0)
        scaler.update()
    if way == "state_dict":
        twin = gmc_cuda.GradScaler("cpu")
        twin.load_state_dict(copy.deepcopy(scaler.state_dict()))
    else:
        twin = pickle.loads(pickle.dumps(scaler))
    assert twin.state_dict() == scaler.state_dict()
    scales = []
    for one in (scaler, twin):
        run, copied = copy.deepcopy((params, optimizer))
        for step in range(5, 12):
            scaled_step(run, copied, one, rank, step, overflow=step == 8 and rank == 1)
            one.update()
            scales.append(one.get_scale())
    assert scales == 2 * [SCALE * factor for factor in (1, 1, 1, 0.5, 0.5, 0.5, 1)]


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_a_scaler_that_is_saved(pool, way):
    pool.run(2, save_and_resume, way)


@pytest.mark.parametrize("clip", [False, True])
def test_other_optimizers_are_scaled_as_by_torch(clip):
    outcomes = []
    for make in (torch.amp.GradScaler, gmc_cuda.GradScaler):
        params = parameters()
        optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        scaler = make("cpu", init_scale=SCALE, growth_interval=GROWTH)
        for step in range(12):
            set_scaled(params, scaler, 0, step)
            if step in (3, 4):
                params[1].grad[0] = float("inf")
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        outcomes.append((flat(params), scaler.state_dict()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


def scale_without_effect(group):
    rank = dist.get_rank(group)
    params, twins = parameters(), parameters()
    optimizer, twin = [
        gmc_cuda.GMC(p, lr=0.05, density=0.1, process_group=group) for p in (params, twins)
    ]
    scaler = gmc_cuda.GradScaler("cpu", enabled=False)
    for step in range(3):
        scaled_step(params, optimizer, scaler, rank, step)
        scaler.update()
        set_gradients(twins, rank, step)
        twin.step()
    assert torch.equal(flat(params), flat(twins))


def test_a_scaler_that_is_switched_off(pool):
    pool.run(2, scale_without_effect)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_only_a_scaler_is_told_to_leave_unscaling_to_the_optimizer(make):
    """Lightning refuses gradient clipping where it sees True, also without a scaler."""
    params = parameters()
    optimizer = make(params, lr=0.1, density=0.1)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.grad_scale.item()))
    scaler = scaler_of()
    scaled_step(params, optimizer, scaler, 0, 0)
    assert seen == [SCALE], "the scaler left unscaling to step()"
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_a_scaler_needs_all_gradients_at_step():
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, overlap=True)
    with pytest.raises(RuntimeError, match="GradScaler needs overlap=False"):
        scaled_step(params, optimizer, scaler_of(), 0, 0)


# ------------------------------------------------------------- after an error nothing is left over


def raise_and_go_on(group):
    """nonfinite="raise" under a scaler: caught, and the run goes on with the common scale."""
    rank = dist.get_rank(group)
    params, twins = parameters(), parameters()
    options = {"lr": 0.05, "density": 0.1, "process_group": group}
    optimizer = gmc_cuda.GMC(params, nonfinite="raise", **options)
    twin = gmc_cuda.GMC(twins, **options)
    scaler = scaler_of()
    for step in range(5):
        overflow = step == 2 and rank == 1
        set_gradients(twins, rank, step)
        if overflow:
            put_nan(twins)
        twin.step()
        if step == 2:
            with pytest.raises(FloatingPointError, match="on rank 1; the step was not made"):
                scaled_step(params, optimizer, scaler, rank, step, overflow)
        else:
            scaled_step(params, optimizer, scaler, rank, step)
        scaler.update()
        assert scaler.get_scale() == SCALE * [1, 1, 0.5, 0.5, 0.5][step]
        assert torch.equal(memory_of(optimizer, params), memory_of(twin, twins))
        assert torch.equal(flat(params), flat(twins))


def test_going_on_after_an_overflow_that_raised(pool):
    pool.run(2, raise_and_go_on)


def refuse_and_go_on(group):
    """A plain scaler is refused; whoever takes the advice goes on with the right scale."""
    rank = dist.get_rank(group)
    params, twins = parameters(), parameters()
    optimizer, twin = [
        gmc_cuda.GMC(p, lr=0.05, density=0.1, process_group=group) for p in (params, twins)
    ]
    plain = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with pytest.raises(RuntimeError, match="use gmc_cuda.GradScaler in its place"):
        scaled_step(params, optimizer, plain, rank, 0)
    optimizer.param_groups[0]["density"] = 7
    scaler = scaler_of()
    with pytest.raises(ValueError, match="density of param group 0: got 7"):
        scaled_step(params, optimizer, scaler, rank, 0)
    optimizer.param_groups[0]["density"] = 0.1
    for step in range(2):
        set_gradients(twins, rank, step)
        twin.step()
    scaled_step(params, optimizer, scaler, rank, 0)
    set_gradients(params, rank, 1)
    optimizer.step()
    assert torch.equal(memory_of(optimizer, params), memory_of(twin, twins))
    assert torch.equal(flat(params), flat(twins))


def test_going_on_after_a_refusal(pool):
    pool.run(2, refuse_and_go_on)
