"""How much is sent: K from a density or from a budget of bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gmc_cuda
from gmc_cuda import ops
from gmc_cuda._engine import budget
from support.cases import WIRES


@given(
    numel=st.integers(1, 3_000_000),
    ratio=st.floats(1, 1e6) | st.integers(1, 200),
    wire_dtype=st.sampled_from(WIRES),
)
def test_k_is_the_largest_within_the_bytes(numel, ratio, wire_dtype):
    k = budget.entries_within(ratio, numel, wire_dtype)
    limit = max(4 * numel / ratio, ops.payload_nbytes(numel, 1, wire_dtype))
    assert 1 <= k <= numel
    if k == numel:
        assert 4 * numel <= limit or numel == 1
        return
    assert ops.payload_nbytes(numel, k, wire_dtype) <= limit
    fits = k + 1 < numel and ops.payload_nbytes(numel, k + 1, wire_dtype) <= limit
    assert not fits
    assert 4 * numel > limit


@pytest.mark.parametrize("wire_dtype", WIRES)
@pytest.mark.parametrize("optimizer", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_an_optimizer_stays_within_its_bytes(optimizer, wire_dtype):
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100))
    ours = optimizer(model.parameters(), lr=0.1, bytes_ratio=100, wire_dtype=wire_dtype)
    assert ours.stats()["bytes_ratio"] == ours.stats()["density"] == 0
    model(torch.randn(5, 200)).square().sum().backward()
    ours.step()
    stats = ours.stats()
    assert 100 <= stats["bytes_ratio"] < 102
    assert stats["bytes_per_step"] * stats["bytes_ratio"] == stats["dense_bytes_per_step"]
    numel = sum(p.numel() for p in model.parameters())
    assert stats["density"] == budget.entries_within(100, numel, wire_dtype) / numel


def test_a_ratio_of_one_is_dense():
    param = nn.Parameter(torch.zeros(1000))
    optimizer = gmc_cuda.GMC([param], lr=1.0, bytes_ratio=1)
    param.grad = torch.arange(1000.0)
    optimizer.step()
    assert torch.equal(param, -torch.arange(1000.0))
    assert optimizer.stats()["density"] == 1


def group_options(optimizer):
    return [(group["density"], group["bytes_ratio"]) for group in optimizer.param_groups]


def test_a_group_has_its_own_budget():
    one, two, three = (nn.Parameter(torch.zeros(1000)) for _ in range(3))
    groups = [{"params": [one]}, {"params": [two], "density": 1.0}]
    optimizer = gmc_cuda.GMC(groups, lr=0.1, bytes_ratio=50)
    optimizer.add_param_group({"params": [three], "bytes_ratio": 20})
    assert group_options(optimizer) == [(None, 50), (1.0, None), (None, 20)]
    by_density = gmc_cuda.GMC([{"params": [one], "bytes_ratio": 5}], lr=0.1)
    assert group_options(by_density) == [(None, 5)]


def test_both_budgets_are_refused():
    param = nn.Parameter(torch.zeros(1000))
    with pytest.raises(ValueError, match=r"bytes_ratio: got 10 beside density=0.5, must be given"):
        gmc_cuda.GMC([param], lr=0.1, density=0.5, bytes_ratio=10)
    with pytest.raises(
        ValueError, match=r"bytes_ratio of param group 0: got 0.5, must be at least"
    ):
        gmc_cuda.GMC([param], lr=0.1, bytes_ratio=0.5)
    optimizer = gmc_cuda.GMC([param], lr=0.1, bytes_ratio=10)
    optimizer.param_groups[0]["density"] = 0.1
    param.grad = torch.ones(1000)
    with pytest.raises(
        ValueError, match=r"density of param group 0: got 0.1 beside bytes_ratio=10"
    ):
        optimizer.step()
    optimizer.param_groups[0]["bytes_ratio"] = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"got bytes_ratio=10 in param group 0, must have a dens"):
        gmc_cuda.DensityWarmup(gmc_cuda.GMC([param], lr=0.1, bytes_ratio=10), 4)


def test_the_budget_is_saved_and_loaded():
    def make(**options):
        return gmc_cuda.GMC([nn.Parameter(torch.zeros(1000))], lr=0.1, **options)

    loaded = make(density=0.5)
    loaded.load_state_dict(make(bytes_ratio=30).state_dict())
    assert group_options(loaded) == [(None, 30)]
    old = make(density=0.5).state_dict()
    del old["param_groups"][0]["bytes_ratio"]  # as saved before there was one
    loaded.load_state_dict(old)
    assert group_options(loaded) == [(0.5, None)]
