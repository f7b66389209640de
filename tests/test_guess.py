"""The guess of compress_: how often it is of no use, and that it never shows in the result."""

import math

import pytest
import torch

import gmc_cuda
from gmc_cuda import ops, reference
from support.cases import assert_same_bytes
from support.sampling import misleading


def compress_both(memory, grads, k, state, **options):
    """Compares with the oracle; returns the payload."""
    expected_memory = memory.clone()
    payload = ops.compress_(memory, grads, k, state=state, **options)
    expected = reference.compress_(expected_memory, grads, k, **options)
    assert_same_bytes(payload, expected, "payload")
    assert_same_bytes(memory, expected_memory, "memory")
    return payload


def jumps(steps, share, seed=5):
    """Scales of gradients: each step drifts a little, and a share of them jumps by 2 to 10."""
    random = torch.Generator().manual_seed(seed)
    scale, scales = 1.0, []
    for _ in range(steps):
        drift, jump, size = torch.rand(3, generator=random).tolist()
        scale *= 1 + 0.2 * (drift - 0.5)
        if jump < share:
            factor = math.exp(math.log(2) + size * math.log(5))
            scale *= factor if scale < 1 else 1 / factor
        scales.append(scale)
    return scales


def repairs_over(scales, numel, densities, momentum=0.0):
    """Share of the steps whose guess was of no use."""
    random = torch.Generator().manual_seed(0)
    ks = [max(1, math.ceil(density * numel)) for density in densities]
    memory, state, aggregate = torch.zeros(numel), ops.select_state(numel, max(ks), "cpu"), None
    for scale, k in zip(scales, ks, strict=True):
        grad = scale * torch.randn(numel, generator=random)
        payload = ops.compress_(
            memory, [grad], k, momentum=momentum, aggregate=aggregate, state=state
        )
        if momentum:
            aggregate = ops.merge(payload.unsqueeze(0), numel, k)
    return ops.repairs(state) / len(scales)


@pytest.mark.parametrize("density", [0.01, 0.001])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_scales_that_jump(density, momentum, share):
    steps = 100
    numel = round(1000 / density)
    assert repairs_over(jumps(steps, share), numel, [density] * steps, momentum) <= 0.02


def test_a_warm_up_of_the_density():
    """A new k in every step, down from a quarter to a thousandth, and up again."""
    down = [max(0.001, 0.25 * 0.95**step) for step in range(110)]
    densities = down + down[::-1]
    assert repairs_over([1.0] * len(densities), 100_000, densities) <= 0.02


def test_a_warm_up_keeps_the_state():
    """DensityWarmup in every step: no new buffer, nothing unlearnt."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = gmc_cuda.GMC([param], lr=0.1, density=0.001)
    schedule = gmc_cuda.schedules.DensityWarmup(optimizer, 60)
    (bucket,) = optimizer.engine.buckets
    states = set()
    for _ in range(80):
        param.grad = torch.randn(100_000)
        optimizer.step()
        schedule.step()
        states.add(bucket.select_state(1).data_ptr())
    assert len(states) == 1
    assert optimizer.stats()["repairs"] <= 2


def test_a_larger_k_takes_over_what_is_known():
    state = torch.arange(64, dtype=torch.uint8)
    assert ops.select_state(1000, 10, "cpu", state) is state
    shorter = state[:40].clone()
    larger = ops.select_state(1000, 10, "cpu", shorter)
    assert larger.tolist() == list(range(40)) + [0] * 24


def test_one_state_serves_any_smaller_k():
    state = ops.select_state(5000, 50, "cpu")
    longer = torch.cat([state, torch.zeros(100, dtype=torch.uint8)])
    memory = torch.zeros(5000)
    for k in (50, 7, 1):
        compress_both(memory, [torch.randn(5000)], k, longer)
    with pytest.raises(ValueError, match=r"state: got shape \[63\], must be \[64\] or longer"):
        ops.compress_(memory, [torch.randn(5000)], 7, state=state[:-1])


@pytest.mark.parametrize("wire", reference.WIRE_DTYPES)
@pytest.mark.parametrize("nonzero", [0, 1, 300, 1999, 2000, 2001, 2600])
def test_memory_that_is_mostly_zero(nonzero, wire):
    """Fewer values than k, as of an embedding: the first zeros fill up, without a repair."""
    numel, k = 200_000, 2000
    state = ops.select_state(numel, k, "cpu")
    torch.manual_seed(nonzero)
    grad = torch.zeros(numel)
    grad[torch.randperm(numel)[:nonzero]] = torch.randn(nonzero)
    grad[5] = -0.0
    memory = torch.zeros(numel)
    memory[7] = -0.0
    for _ in range(3):
        compress_both(memory, [grad], k, state, wire_dtype=wire)
    assert ops.repairs(state) == 0


def test_values_that_vanish_and_come_back():
    """Zeros after values cost one repair at most, and values after zeros none."""
    numel, k = 100_000, 1000
    state = ops.select_state(numel, k, "cpu")
    torch.manual_seed(0)
    for grad in [torch.randn(numel), torch.zeros(numel), torch.zeros(numel)] * 3:
        compress_both(torch.zeros(numel), [grad], k, state)
    assert ops.repairs(state) == 0


@pytest.mark.parametrize("factor", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("wire", [torch.bfloat16, reference.FLOAT8, reference.FLOAT4])
def test_a_sample_that_misleads(factor, wire):
    """Far too many candidates, or none but those that were looked at: a repair, the same result."""
    numel, k = 300_000, 3000
    state = ops.select_state(numel, k, "cpu")
    torch.manual_seed(0)
    memory = 0.01 * torch.randn(numel)
    compress_both(memory, [misleading(torch.randn(numel), k, factor)], k, state, wire_dtype=wire)
    assert ops.repairs(state) == 1
    compress_both(memory, [torch.randn(numel)], k, state, wire_dtype=wire)
