"""Ranks that differ: an error on every rank that says what differs, not a hang."""

import re

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import parameters, set_gradients
from support.workers import Failure


def build(group, change):
    rank = dist.get_rank(group)
    params = parameters()
    options = {"lr": 0.1, "process_group": group}
    if rank == 1:
        if change == "shape":
            params[3] = torch.nn.Parameter(torch.zeros(2, 2))
        elif change == "dtype":
            params[3] = torch.nn.Parameter(params[3].detach().bfloat16())
        elif change == "count":
            del params[3:]
        elif change == "frozen":
            params[3].requires_grad_(False)
        elif change == "complex":
            params[3] = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        elif change == "names":
            pass
        else:
            options |= change
    names = [(f"layer{i}", p) for i, p in enumerate(params)]
    gmc_cuda.GMC(names, **options)


CASES = [
    ("shape", r"shape of parameter 3 \('layer3'\), group 0: \(3, 4, 2\) on rank 0, \(2, 2\) on r"),
    ("dtype", r"dtype of parameter 3 \('layer3'\), group 0: 'torch.float32' on rank 0, 'torch.bfl"),
    ("count", r"number of parameters in group 0: 6 on rank 0, 3 on rank 1"),
    ("frozen", r"requires_grad of parameter 3 \('layer3'\), group 0: True on rank 0, False on"),
    ({"lr": 0.2}, r"lr of group 0: 0.1 on rank 0, 0.2 on rank 1"),
    ({"density": 0.1}, r"density of group 0: 0.01 on rank 0, 0.1 on rank 1"),
    ({"wire_dtype": torch.float16}, r"wire_dtype: 'torch.bfloat16' on rank 0, 'torch.float16' on"),
    ({"overlap": True}, r"overlap: False on rank 0, True on rank 1"),
    ({"momentum_form": "iterate"}, r"momentum_form of group 0: 'buffer' on rank 0, 'iterate' on"),
]


@pytest.mark.parametrize("change,words", CASES)
def test_every_rank_says_what_differs(pool, change, words):
    for result in pool.try_run(2, build, change):
        assert isinstance(result, Failure)
        assert result.type == "ValueError"
        assert "all ranks must train the same model" in result.message
        assert re.search(words, result.message), result.message


def test_an_error_of_one_rank_reaches_all(pool):
    first, second = pool.try_run(2, build, "complex")
    assert second.type == "TypeError"
    assert "got torch.complex64, must be" in second.message
    assert first.type == "RuntimeError"
    assert "rank 1 could not set its optimizer up: TypeError" in first.message


def test_equal_ranks_agree(pool):
    pool.run(4, build, "names")


def add_a_group(group, differ):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params[:3], lr=0.1, process_group=group)
    set_gradients(params, rank, 0)
    optimizer.step()
    memory = optimizer.state[params[0]]["memory"].clone()
    added = {"params": params[3:], "density": 0.5 if differ and rank == 1 else 0.2}
    if differ:
        with pytest.raises(ValueError, match="density of group 1: 0.2 on rank 0, 0.5 on rank 1"):
            optimizer.add_param_group(added)
        assert len(optimizer.param_groups) == 1
    else:
        if rank == 1:
            with torch.no_grad():
                params[4].zero_()
        optimizer.add_param_group(added)
        assert params[4].count_nonzero() > 0, "rank 0's parameters are sent to the new group too"
        assert "memory" in optimizer.state[params[5]]
    assert torch.equal(optimizer.state[params[0]]["memory"], memory)
    set_gradients(params, rank, 1)
    optimizer.step()


@pytest.mark.parametrize("differ", [False, True])
def test_added_param_group(pool, differ):
    pool.run(2, add_a_group, differ)
