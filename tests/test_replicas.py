"""Invariants 5 and 7: replicas stay bit-identical, and skip a step together."""

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import flat, memory_of, parameters, same_on_all_ranks, set_gradients
from support.workers import SIZES

METHODS = {
    "gmc": (gmc_cuda.GMC, {}),
    "gmc iterate": (gmc_cuda.GMC, {"momentum_form": "iterate"}),
    "dgc": (gmc_cuda.DGC, {"nesterov": True, "clip_norm": 5.0}),
    "memory sgd": (gmc_cuda.DGC, {"momentum_masking": False}),
    "dense": (gmc_cuda.GMC, {"density": 1.0}),
    # Sums whose rounding depends on the order of the ranks.
    "gmc in float32": (gmc_cuda.GMC, {"density": 0.2, "wire_dtype": torch.float32}),
    "gmc in float8": (gmc_cuda.GMC, {"density": 0.2, "wire_dtype": torch.float8_e4m3fn}),
    "dgc in float4": (gmc_cuda.DGC, {"wire_dtype": torch.float4_e2m1fn_x2}),
}


def train(group, method, steps, dtype, nan_at=()):
    rank = dist.get_rank(group)
    params = parameters(dtype)
    if rank > 0:
        with torch.no_grad():
            params[0].zero_()  # broadcast_parameters mends it
    make, options = METHODS[method]
    options = {"density": 0.02, "weight_decay": 1e-3, **options}
    optimizer = make(params, lr=0.02, process_group=group, bucket_cap_mb=200 * 4 / 2**20, **options)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2], gamma=0.1)
    for step in range(steps):
        set_gradients(params, rank, step)
        if step in nan_at and rank == step % dist.get_world_size(group):
            params[-1].grad[0, 0] = float("inf")
        optimizer.step()
        scheduler.step()
    assert same_on_all_ranks(group, params)
    return [p.detach().clone() for p in params], optimizer.stats()


@pytest.mark.parametrize(
    "size,method,dtype,steps",
    [
        pytest.param(4, "gmc", torch.float32, 500, marks=pytest.mark.slow),
        pytest.param(2, "dgc", torch.bfloat16, 500, marks=pytest.mark.slow),
        *[(4, method, torch.float32, 40) for method in METHODS],
        *[(2, method, torch.bfloat16, 40) for method in METHODS],
        (1, "gmc", torch.bfloat16, 40),
    ],
)
def test_replicas_and_repetitions_have_the_same_bits(pool, size, method, dtype, steps):
    """Invariant 5."""
    first = pool.run(size, train, method, steps, dtype, (10, 33))[0]
    again = pool.run(size, train, method, steps, dtype, (10, 33))[0]
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert first[1] == again[1]
    assert first[1]["steps"] == steps
    assert first[1]["skipped_steps"] == 2


def skip_together(group, method, where):
    rank = dist.get_rank(group)
    params = parameters()
    make, options = METHODS[method]
    optimizer = make(params, lr=0.02, process_group=group, **{"density": 0.05, **options})
    for step in range(6):
        before, memory = flat(params), memory_of(optimizer, params)
        set_gradients(params, rank, step)
        if step == 3 and rank == dist.get_world_size(group) - 1:
            params[0].grad[1, 1] = where
        optimizer.step()
        assert memory_of(optimizer, params).isfinite().all()
        if step == 3:
            assert torch.equal(flat(params), before)
            assert not torch.equal(memory_of(optimizer, params), memory)
        else:
            assert not torch.equal(flat(params), before)
    assert optimizer.stats()["skipped_steps"] == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_all_ranks_skip_a_step_with_one_non_finite_value(pool, size, method, value):
    """Invariant 7; that nothing finite is lost is checked by invariant 2."""
    pool.run(size, skip_together, method, value)


def raise_together(group):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.02, density=0.05, process_group=group, nonfinite="raise")
    set_gradients(params, rank, 0)
    optimizer.step()
    before = flat(params)
    set_gradients(params, rank, 1)
    if rank == 1:
        params[3].grad[0, 0] = float("nan")  # two elements
        params[4].grad.fill_(float("inf"))
    finite = [p.grad.clone() for p in params]
    with pytest.raises(FloatingPointError, match="3 on rank 1; the step was not made"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    held = memory_of(optimizer, params)
    assert held.isfinite().all()
    # The step's gradients are in memory: they go out with the next one.
    assert (held - flat([g.nan_to_num(0.0, 0.0, 0.0) for g in finite])).norm() < held.norm()
    set_gradients(params, rank, 2)
    optimizer.step()
    assert same_on_all_ranks(group, params)
    assert optimizer.stats()["skipped_steps"] == 1


def test_raising_on_every_rank(pool):
    pool.run(4, raise_together)


def damaged_on_arrival(group):
    """A payload damaged on the way: an error where it was seen, and nothing half-updated."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.02, density=0.05, process_group=group)
    set_gradients(params, rank, 0)
    optimizer.step()
    before = flat(params)
    set_gradients(params, rank, 1)
    gathered = optimizer.engine.exchange.all_gather

    def damage(payload):
        payloads, work = gathered(payload)
        work.wait()
        if rank == 0:
            payloads[1, 32] ^= 0xFF
        return payloads, work

    optimizer.engine.exchange.all_gather = damage
    if rank == 1:
        optimizer.step()
        return
    memory = memory_of(optimizer, params) + flat([p.grad for p in params])
    with pytest.raises(RuntimeError, match="payload of rank 1 is damaged"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    assert memory_of(optimizer, params).norm() >= 0.5 * memory.norm()


def test_damaged_payload_raises_where_it_was_seen(pool):
    pool.run(2, damaged_on_arrival)
