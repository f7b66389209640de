"""What a run must not go on without noticing."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from gmc_cuda import ops
from gmc_cuda._engine.fingerprint import fingerprints
from gmc_cuda._engine.watch import DamageWatch
from support.problems import flat, parameters, set_gradients

# ------------------------------------------------------------------------------ damaged payloads


def test_damage_is_seen_once_it_has_arrived_and_never_forgotten():
    watch = DamageWatch()
    watch.check(rank=3)  # nothing was received yet
    watch._flags, watch._seen = torch.zeros(2, 1, dtype=torch.int32)  # as if on a GPU
    watch._flags.fill_(ops.NONFINITE)
    watch.report()
    watch.check(rank=3)
    watch._flags |= ops.DAMAGED
    watch.check(rank=3)  # the copy is still on its way
    for _ in range(2):
        watch.report()
        with pytest.raises(RuntimeError, match="rank 3 received a damaged payload in an earlier"):
            watch.check(rank=3)


def test_kernels_report_damage_only_where_something_arrives():
    skip = torch.zeros(1, dtype=torch.int32)
    assert DamageWatch().flags(skip, size=2) is None  # on the CPU it raises
    assert DamageWatch().flags(skip, size=1) is None


# ---------------------------------------------------------------------- workers that send the same


def same_data(group, same, density):
    """All ranks have rank 0's gradients, as behind DistributedDataParallel, or their own."""
    rank = 0 if same else dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=density, process_group=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # payloads of zeros say nothing
        for step in range(8):
            set_gradients(params, rank, step)
            optimizer.step()
    return [str(w.message) for w in caught if "gmc_cuda" in str(w.message)]


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_duplicated_data_is_warned_about_once(pool, density):
    for texts in pool.run(2, same_data, True, density):
        (text,) = texts
        assert "all 2 workers sent the same payload in 3 steps" in text
        assert "gmc_cuda.local_gradients(ddp_model)" in text
        assert "DistributedSampler" in text
    assert pool.run(2, same_data, False, density) == [[], []]
    assert pool.run(1, same_data, True, density) == [[]]


# ---------------------------------------------------------------------------- replicas that differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_counts_in_a_fingerprint(dtype):
    params = [torch.randn(n).to(dtype) for n in (1, 7, 64, 1000, 70_001, 3_000_000)]
    prints = fingerprints(params)
    assert torch.equal(prints, fingerprints(copy.deepcopy(params)))
    assert torch.equal(prints, torch.cat([fingerprints([p]) for p in params]))
    for i in (1, 3, 4, 5):
        changed = copy.deepcopy(params)
        bits = changed[i].view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits[5] ^= 1
        differs = fingerprints(changed) != prints
        assert differs.tolist() == [j == i for j in range(len(params))]
        bits[5] ^= 1
        bits[[2, 3]] = bits[[3, 2]]  # the same bits in another order
        assert fingerprints(changed)[i] != prints[i]


def drift(group, every):
    rank = dist.get_rank(group)
    named = [(f"layer{i}", p) for i, p in enumerate(parameters())]
    params = [p for _, p in named]
    optimizer = gmc_cuda.GMC(named, lr=0.1, process_group=group, check_replicas_every=every)
    for step in range(6):
        set_gradients(params, rank, step)
        if step == 4 and rank == 2:
            params[3].data.view(torch.int32).view(-1)[5] ^= 1
        if every and step == 5:
            words = (
                r"after step 6: parameter 3 \('layer3'\) of group 0 has other bits on rank 2 than"
            )
            with pytest.raises(RuntimeError, match=words):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("every", [0, 3])
def test_replicas_that_differ_raise_on_every_rank(pool, every):
    pool.run(4, drift, every)


STARTS = {
    "loaded on rank 0 only": lambda rank: rank == 0,
    "loaded on another rank only": lambda rank: rank == 1,
    "drawn anew on each rank": lambda rank: True,
}


def start_apart(group, case, overlap, after):
    """Weights that are not the same on all workers any more, after so many steps."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, process_group=group, overlap=overlap)
    torch.manual_seed(rank)
    said = None
    for step in range(after + 1):
        optimizer.zero_grad()
        if step == after and STARTS[case](rank):
            params[2].data.normal_()
        before = flat(params)
        try:
            sum((p * torch.randn(p.shape)).sum() for p in params).backward()
            optimizer.step()
        except ValueError as error:
            said = str(error)
            assert torch.equal(flat(params), before), "nothing was applied"
    return said


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("overlap,after", [(False, 0), (True, 0), (False, 1)])
def test_weights_that_differ_from_the_start_are_named_on_every_rank(pool, case, overlap, after):
    for said in pool.run(2, start_apart, case, overlap, after):
        assert "bits of parameter 2 of group 0: " in said
        assert "parameter 1 " not in said
        assert "Load weights before the optimizer is constructed" in said


def skip_often(group, make, ranks, pause, density):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = make(params, lr=0.1, density=density, process_group=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(25):
            set_gradients(params, rank, step)
            if rank in ranks and step >= 3 and step != pause:
                params[1].grad[:2] = float("nan")
            optimizer.step()
    return [str(w.message) for w in caught if "in a row" in str(w.message)]


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_many_skipped_steps_in_a_row_are_said(pool, make, ranks, density):
    for texts in pool.run(2, skip_often, make, ranks, None, density):
        (text,) = texts
        assert text.startswith("10 steps in a row were skipped")
        assert ", ".join(f"2 on rank {rank}" for rank in ranks) in text


def test_skipped_steps_with_others_between_start_anew(pool):
    """Of the 22 steps from the fourth on, one after nine is made: ten in a row come after it."""
    assert [len(texts) for texts in pool.run(2, skip_often, gmc_cuda.GMC, [1], 12, 0.1)] == [1, 1]
    assert pool.run(2, skip_often, gmc_cuda.GMC, [1], 14, 0.1) != [[], []]
    assert pool.run(2, skip_often, gmc_cuda.GMC, [], None, 0.1) == [[], []]


def skip_in_a_part_of_the_run(group):
    if dist.get_rank(group) == 0:
        return []
    part = dist.new_group([1, 2], use_local_synchronization=True)
    return skip_often(part, gmc_cuda.GMC, [1], None, 0.1)


def test_skipped_steps_name_the_ranks_of_the_run(pool):
    _, *others = pool.run(3, skip_in_a_part_of_the_run)
    for (text,) in others:
        assert "2 on rank 2 in this step" in text
