"""Invariant 12: two-sided compression keeps all that the all-gather keeps, with owner memory."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import gmc_cuda
from gmc_cuda import ops, reference
from gmc_cuda._engine import budget, exchange, ranges
from gmc_cuda._engine.device import is_synchronous
from gmc_cuda._engine.rules import GlobalMomentum
from support.cases import WIRES
from support.problems import (
    aggregate_of,
    flat,
    mean,
    memory_of,
    parameters,
    same_on_all_ranks,
    set_gradients,
)
from support.workers import Workers

TWO_SIDED = {"exchange": "reduce_scatter"}
DENSITY, LR, BETA = 0.05, 0.05, 0.9
FLOAT4 = torch.float4_e2m1fn_x2


# --------------------------------------------------------------------- the reference, bit by bit


class Simulated:
    """Workers in one process, by the functions of the reference alone."""

    def __init__(self, params, size, make, wire_dtype, options):
        self.params, self.size, self.wire_dtype = params, size, wire_dtype
        self.global_momentum = make is gmc_cuda.GMC
        self.nesterov = options.get("nesterov", False)
        self.decay = options.get("weight_decay", 0.0)
        self.memory_decay = options.get("memory_decay", 1.0)
        numel = sum(p.numel() for p in params)
        self.ranges = reference.ranges(numel, size)
        self.k = [max(1, math.ceil(DENSITY * (end - begin))) for begin, end in self.ranges]
        self.memories = torch.zeros(size, numel)
        self.buffers = None if self.global_momentum else torch.zeros(size, numel)
        self.owned = [torch.zeros(end - begin) for begin, end in self.ranges]
        self.a = torch.zeros(numel)

    def step(self, grads):
        """Args: grads: each worker's, flat."""
        w = torch.cat([p.detach().reshape(-1) for p in self.params])
        sent = [self._compress(k, grad, w) for k, grad in enumerate(grads)]
        skip = any(reference.unpack(c, end - begin, self.k[j], self.wire_dtype)[2] > 0
                   for worker in sent
                   for j, (c, (begin, end)) in enumerate(zip(worker, self.ranges)))  # fmt: skip
        skip = torch.tensor([int(skip)], dtype=torch.int32)
        a = torch.zeros_like(self.a)
        for j, (begin, end) in enumerate(self.ranges):
            previous = reference.sparsify(self.a[begin:end]) if self.global_momentum else None
            reply = reference.own_(
                self.owned[j], torch.stack([worker[j] for worker in sent]), self.k[j],
                self.wire_dtype, momentum=BETA, aggregate=previous,
                memory_decay=self.memory_decay, found_inf=skip,
            )  # fmt: skip
            reference.restore_(self.owned[j], reply, self.k[j], self.wire_dtype, skip=skip)
            merged = reference.merge(
                reply[None], end - begin, self.k[j], self.wire_dtype, skip=skip
            )
            a[begin:end] = reference.densify(merged, end - begin)
            for k in range(self.size if self.buffers is not None else 0):
                reference.mask_(
                    self.buffers[k][begin:end], sent[k][j], self.k[j], self.wire_dtype, skip=skip
                )
        params = [p.detach().view(-1) for p in self.params]
        if self.global_momentum and self.nesterov:
            reference.apply_(params, reference.sparsify(self.a), -LR * BETA, skip=skip)
        ahead = 1 + BETA if self.global_momentum and self.nesterov else 1
        reference.apply_(params, reference.sparsify(a), LR * ahead, skip=skip)
        self.a = a

    def _compress(self, k, grad, w):
        rule = {"weight_decay": self.decay, "memory_decay": self.memory_decay}
        if self.buffers is not None:
            rule |= {"momentum": BETA, "nesterov": self.nesterov}
        return [
            reference.compress_(
                self.memories[k][begin:end], [grad[begin:end]], self.k[j], params=[w[begin:end]],
                momentum_buffer=None if self.buffers is None else self.buffers[k][begin:end],
                wire_dtype=self.wire_dtype, **rule,
            )
            for j, (begin, end) in enumerate(self.ranges)
        ]  # fmt: skip


def gradients(params, rank, step, nan_at):
    set_gradients(params, rank, step)
    if nan_at.get(step) == rank:
        params[2].grad.view(-1)[7] = float("nan")
        params[5].grad.view(-1)[0] = float("inf")
    return [p.grad for p in params]


def train(group, make, wire_dtype, options, steps, nan_at):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = make(
        params, lr=LR, momentum=BETA, density=DENSITY, wire_dtype=wire_dtype, process_group=group,
        **TWO_SIDED, **options,
    )  # fmt: skip
    for step in range(steps):
        gradients(params, rank, step, nan_at)
        optimizer.step()
    (bucket,) = optimizer.engine.buckets
    assert bucket.owner is not None
    return {
        "params": torch.cat([p.detach().view(-1) for p in bucket.params]),
        "memory": bucket.memory, "owned": bucket.owner.memory, "buffer": bucket.momentum_buffer,
        "a": bucket.momentum(), "skipped": optimizer.stats()["skipped_steps"],
    }  # fmt: skip


METHODS = {
    "GMC": (gmc_cuda.GMC, {}),
    "GMC, nesterov, decays": (
        gmc_cuda.GMC,
        {"nesterov": True, "weight_decay": 0.01, "memory_decay": 0.9},
    ),
    "DGC": (gmc_cuda.DGC, {}),
    "DGC, nesterov, memory grows": (
        gmc_cuda.DGC,
        {"nesterov": True, "weight_decay": 0.01, "memory_decay": 1.1},
    ),
}


@pytest.mark.parametrize(
    "size,wire_dtype,method",
    [
        *[(size, torch.bfloat16, method) for size in (2, 3, 8) for method in METHODS],
        *[(4, wire_dtype, method) for wire_dtype in WIRES for method in ("GMC", "DGC")],
    ],
)
def test_workers_have_the_bits_of_the_reference(pool, size, wire_dtype, method):
    make, options = METHODS[method]
    steps, nan_at = 12, {5: size - 1, 6: 0}
    ranks = pool.run(size, train, make, wire_dtype, options, steps, nan_at)

    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR)
    (bucket,) = optimizer.engine.buckets  # in whose order all is flat
    simulated = Simulated(bucket.params, size, make, wire_dtype, options)
    for step in range(steps):
        grads = []
        for rank in range(size):
            gradients(params, rank, step, nan_at)
            grads.append(torch.cat([p.grad.view(-1) for p in bucket.params]))
        simulated.step(grads)
    w = torch.cat([p.detach().view(-1) for p in bucket.params])
    for rank, found in enumerate(ranks):
        assert found["skipped"] == 2
        assert torch.equal(found["params"], w)
        assert torch.equal(found["memory"], simulated.memories[rank])
        assert torch.equal(found["owned"], simulated.owned[rank])
        if make is gmc_cuda.GMC:
            assert torch.equal(found["a"], simulated.a)
        else:
            assert torch.equal(found["buffer"], simulated.buffers[rank])
    assert any(owned.any() for owned in simulated.owned)


def alone(group, make, options, steps):
    twins = []
    for way in ("all_gather", "reduce_scatter"):
        params = parameters()
        optimizer = make(params, lr=LR, density=DENSITY, process_group=group, exchange=way,
                         **options)  # fmt: skip
        for step in range(steps):
            set_gradients(params, 0, step)
            optimizer.step()
        twins.append((flat(params), memory_of(optimizer, params), aggregate_of(optimizer, params)))
    for one, other in zip(*twins, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_alone_makes_the_steps_of_the_all_gather(pool, method):
    pool.run(1, alone, *METHODS[method], 10)


# ------------------------------------------------------------------------------ ranges and bytes


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 100, 538, 65536, 10_000_019])
@pytest.mark.parametrize("size", [2, 3, 4, 8, 1024])
def test_ranges_cover_every_element_once(numel, size):
    found = ranges.cut(numel, size)
    assert [tuple(r) for r in found] == reference.ranges(numel, size)
    assert len(found) == size
    assert found[0].begin == 0
    assert found[-1].end == numel
    for one, next_one in itertools.pairwise(found):
        assert one.end == next_one.begin
        assert one.numel >= next_one.numel
        assert next_one.begin % ranges.UNIT == 0 or next_one.numel == 0


def count_bytes(group, make, numel, wire_dtype, ratio, way):
    """What one step puts into collectives for others, counted where torch takes it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = []

    def counted(collective, others):
        def call(output, input, *args, **kwargs):
            sent.append(others(input, kwargs))
            return collective(output, input, *args, **kwargs)

        return call

    def to_others(input, kwargs):
        return input.numel() - kwargs["input_split_sizes"][rank]

    param = torch.nn.Parameter(torch.zeros(numel))
    optimizer = make([param], lr=LR, bytes_ratio=ratio, wire_dtype=wire_dtype, process_group=group,
                     exchange=way)  # fmt: skip
    param.grad = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
    real = exchange._all_gather, dist.all_to_all_single
    exchange._all_gather = counted(real[0], lambda input, _: (size - 1) * input.numel())
    dist.all_to_all_single = counted(real[1], to_others)
    try:
        optimizer.step()
    finally:
        exchange._all_gather, dist.all_to_all_single = real
    stats = optimizer.stats()
    assert len(sent) == (2 if way == "reduce_scatter" else 1)
    assert sum(sent) == stats["link_bytes_sent"]
    ring = 2 * (size - 1) * 4 * numel / size
    return ring / sum(sent), stats["bytes_ratio"]


@pytest.mark.parametrize("way", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_a_link_carries_a_hundredth_of_a_ring(pool, size, make, way):
    """Within 2 %, for any number of workers."""
    for counted, told in pool.run(size, count_bytes, make, 1_000_000, FLOAT4, 100.0, way):
        assert 100 <= told <= counted * 1.001
        assert counted <= 102


@pytest.mark.parametrize("size", [16, 64, 1024])
def test_a_link_of_many_workers_carries_a_hundredth_of_a_ring(size):
    parts = gmc_cuda._engine.rules._parts(None, 100.0, 100_000_000, FLOAT4, size)
    link = sum(part.nbytes for part in parts[1:]) + (size - 1) * parts[0].nbytes
    ratio = budget.ring_nbytes(400_000_000, size) / link
    assert 100 <= ratio <= 102


def test_a_bucket_goes_dense_where_that_costs_less():
    def dense(numel, density, size):
        param = torch.nn.Parameter(torch.zeros(numel))
        optimizer = gmc_cuda.GMC([param], lr=LR, density=density)
        (bucket,) = optimizer.engine.buckets
        rule, group = optimizer.engine.rule, optimizer.param_groups[0]
        bucket.owner = gmc_cuda._engine.owner.Owner(
            ranges.cut(numel, size)[0], 0, size, torch.device("cpu")
        )
        workers = exchange.Exchange(None)
        workers.size = size
        return rule.plan(group, bucket, torch.bfloat16, workers).dense

    assert not dense(10_000_000, 0.01, 1000)  # an all-gather would be dense from about 600 on
    assert dense(100_000, 1.0, 4)
    assert dense(100_000, 0.9, 4) is False
    assert dense(5, 0.2, 2)  # the second range would be empty


# ---------------------------------------------------------------------------- state and its copies


def resume(group, make, options, way):
    """In the middle of a run: the same bits as without stopping."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = make(params, lr=LR, density=DENSITY, process_group=group, **TWO_SIDED, **options)
    for step in range(6):
        set_gradients(params, rank, step)
        optimizer.step()
    assert any(optimizer.state[p]["owner_memory"].any() for p in params)
    if way == "state_dict":
        twins = copy.deepcopy(params)
        other = make(twins, lr=1.0, process_group=group, **TWO_SIDED, **options)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    elif way == "its own":
        optimizer.load_state_dict(optimizer.state_dict())
        other, twins = copy.deepcopy((optimizer, params))
        other.process_group = group
    else:
        other, twins = pickle.loads(pickle.dumps((optimizer, params)))
        other.process_group = group
    for step in range(6, 10):
        for one, its_params in ((optimizer, params), (other, twins)):
            set_gradients(its_params, rank, step)
            one.step()
    assert torch.equal(flat(params), flat(twins))
    for one, twin in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[one]["memory"], other.state[twin]["memory"])
        owned = [o.state[p]["owner_memory"].clone() for o, p in ((optimizer, one), (other, twin))]
        assert torch.equal(*owned)
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("way", ["state_dict", "its own", "pickle"])
@pytest.mark.parametrize("method", ["GMC", "DGC, nesterov, memory grows"])
def test_resuming_gives_the_same_bits(pool, method, way):
    pool.run(4, resume, *METHODS[method], way)


def whole_of(group, optimizer, params):
    """ubar + r, float64, the same on all ranks."""
    return mean(group, memory_of(optimizer, params))


def change_and_go_on(group, change):
    """What a change of the public state leaves of ubar + r, and whether the run goes on."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    optimizer = gmc_cuda.GMC(groups, lr=LR, density=DENSITY, process_group=group, **TWO_SIDED)
    for step in range(5):
        set_gradients(params, rank, step)
        optimizer.step()
    before, a = whole_of(group, optimizer, params), aggregate_of(optimizer, params)
    change(optimizer, params, group)
    after = whole_of(group, optimizer, params)
    assert torch.equal(aggregate_of(optimizer, params), a)
    for step in range(5, 9):
        set_gradients(params, rank, step)
        g = mean(group, flat([p.grad for p in params]))
        u, a = whole_of(group, optimizer, params), aggregate_of(optimizer, params)
        optimizer.step()
        came_in = u + g + 0.9 * a
        torch.testing.assert_close(
            whole_of(group, optimizer, params) + aggregate_of(optimizer, params), came_in,
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip
    assert same_on_all_ranks(group, params)
    return (after - before).abs().max().item(), before.abs().max().item(), size


def one_bucket(optimizer, params, group):
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]


def other_order(optimizer, params, group):
    optimizer.param_groups.reverse()


def frozen_and_back(optimizer, params, group):
    params[1].requires_grad_(False)
    optimizer.stats()
    params[1].requires_grad_(True)


def averaged(optimizer, params, group):
    optimizer.average_memory_()
    assert not any(optimizer.state[p]["owner_memory"].any() for p in params)
    own = flat([optimizer.state[p]["memory"] for p in params])
    assert torch.equal(own, mean(group, own))


def replaced(optimizer, params, group):
    for param in params:
        optimizer.state[param]["owner_memory"] = optimizer.state[param]["owner_memory"].clone()


def written_elsewhere(optimizer, params, group):
    """What is written outside the range that this worker owns counts as much."""
    for param in params:
        optimizer.state[param]["owner_memory"].add_(1.0)
    for param in params:  # each of p workers has added p times 1 in the mean of p
        optimizer.state[param]["memory"].sub_(float(dist.get_world_size(group)))


CHANGES = [one_bucket, other_order, frozen_and_back, averaged, replaced, written_elsewhere]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [2, 4])
def test_changes_of_the_public_state_keep_what_is_unsent(pool, size, change):
    for lost, whole, _ in pool.run(size, change_and_go_on, change):
        assert whole > 0.1
        assert lost <= 1e-5


def clear(group):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR, density=DENSITY, process_group=group, **TWO_SIDED)
    set_gradients(params, rank, 0)
    optimizer.step()
    for param in params:
        optimizer.state[param]["owner_memory"].zero_()
        optimizer.state[param]["memory"].zero_()
    assert memory_of(optimizer, params).count_nonzero() == 0
    optimizer.state.clear()
    assert memory_of_nothing(optimizer)


def memory_of_nothing(optimizer):
    return not any(bucket.owner.memory.any() for bucket in optimizer.engine.buckets)


def test_owner_memory_can_be_cleared(pool):
    pool.run(2, clear)


def to_another_way(group):
    """A state with owner memory in an optimizer without, and back."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR, density=DENSITY, process_group=group, **TWO_SIDED)
    for step in range(4):
        set_gradients(params, rank, step)
        optimizer.step()
    whole = whole_of(group, optimizer, params)
    for way in ("all_gather", "reduce_scatter"):
        other = gmc_cuda.GMC(params, lr=LR, density=DENSITY, process_group=group, exchange=way)
        other.load_state_dict(optimizer.state_dict())
        torch.testing.assert_close(whole_of(group, other, params), whole, rtol=1e-6, atol=1e-6)
        optimizer = other
    with pytest.raises(ValueError, match="not sent yet"):
        optimizer.sgd_state_dict()


def test_a_state_loads_into_the_other_way_of_exchanging(pool):
    pool.run(4, to_another_way)


# --------------------------------------------------------------------------- damage and its names


def error_of(step):
    """What the RuntimeError says that this raises; nothing where it raises none."""
    try:
        step()
    except RuntimeError as error:
        return str(error)
    return ""


def damaged(group, direction, where, nonfinite):
    """A payload damaged on its way to its owner, or back: who says what, and what is kept.

    Returns (whether operators raise here, what is said).
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(
        params, lr=LR, density=DENSITY, process_group=group, nonfinite=nonfinite, **TWO_SIDED
    )
    set_gradients(params, rank, 0)
    optimizer.step()
    before, u = flat(params), whole_of(group, optimizer, params)
    a = aggregate_of(optimizer, params)
    set_gradients(params, rank, 1)
    g = mean(group, flat([p.grad for p in params]))
    name = {"towards": "all_to_all", "back": "all_gather"}[direction]
    real = getattr(optimizer.engine.exchange, name)

    def damage(*args):
        payloads, work = real(*args)
        work.wait()
        if rank == 1:
            payloads[2, where] ^= 0xFF
        return payloads, work

    setattr(optimizer.engine.exchange, name, damage)
    words = error_of(optimizer.step)
    delattr(optimizer.engine.exchange, name)
    raises = is_synchronous(params[0].device)
    late = not raises and nonfinite == "skip"
    if late:
        assert words == ""
        words = error_of(lambda: optimizer.engine.round.damage.check(rank))
    if direction == "back":  # the others have made the step
        return raises, words
    assert torch.equal(flat(params), before)
    came_in = u + g + 0.9 * a
    torch.testing.assert_close(whole_of(group, optimizer, params), came_in, rtol=1e-5, atol=1e-5)
    if late:  # an optimizer that learns it so late refuses to go on
        return raises, words
    set_gradients(params, rank, 2)
    optimizer.step()
    assert same_on_all_ranks(group, params)
    assert not torch.equal(flat(params), before)
    assert size == 4
    return raises, words


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("where", [0, 40])  # in the header, in an index
def test_damage_on_the_way_to_an_owner(pool, where, nonfinite):
    """The owner says it, the others learn that there is no step, and nothing is lost."""
    found = pool.run(4, damaged, "towards", where, nonfinite)
    raises, words = found[1][0], [said for _, said in found]
    named = "payload of rank 2 is damaged" if raises else "rank 1 received a damaged payload"
    assert named in words[1]
    at_once = raises or nonfinite == "raise"
    told = "another worker left it by an exc" if at_once else "one of them had left its step"
    assert all(told in words[rank] for rank in (0, 2, 3))
    assert at_once == ("the next step works" in words[0])


@pytest.mark.parametrize("where", [0, 40])
def test_damage_on_the_way_back(pool, where):
    words = [said for _, said in pool.run(4, damaged, "back", where, "skip")]
    assert "damaged" in words[1]
    assert [words[rank] for rank in (0, 2, 3)] == ["", "", ""]


def raise_together(group):
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(
        params, lr=LR, density=DENSITY, process_group=group, nonfinite="raise", **TWO_SIDED
    )
    set_gradients(params, rank, 0)
    if rank == 2:
        for param in params[2:5]:  # in several ranges
            param.grad.view(-1)[0] = float("nan")
    u = flat([p.grad.nan_to_num(0.0) for p in params])
    with pytest.raises(FloatingPointError, match="3 on rank 2; the step was not made"):
        optimizer.step()
    torch.testing.assert_close(memory_of(optimizer, params), u)


def test_the_worker_that_met_them_is_named(pool):
    pool.run(4, raise_together)


# -------------------------------------------------------------------------------------- its own


def in_a_hook(group):
    """gmc_hook makes GMC's steps."""
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank(group)
    torch.manual_seed(3)
    model, twin = (torch.nn.Linear(40, 30) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    ddp = DistributedDataParallel(model, process_group=group)
    options = {"density": DENSITY, "momentum": 0.5, **TWO_SIDED}
    state = gmc_cuda.GMCHookState(group, named_parameters=model.named_parameters(), **options)
    ddp.register_comm_hook(state, gmc_cuda.gmc_hook)
    sgd = torch.optim.SGD(ddp.parameters(), lr=LR)
    optimizer = gmc_cuda.GMC(twin.parameters(), lr=LR, process_group=group, **options)
    for step in range(8):
        torch.manual_seed(100 * step + rank)
        x = torch.randn(6, 40)
        for one, its_optimizer in ((ddp, sgd), (twin, optimizer)):
            its_optimizer.zero_grad()
            one(x).square().mean().backward()
            its_optimizer.step()
        if step == 4:
            state.load_state_dict(copy.deepcopy(state.state_dict()))
    # The buckets hold the same in another order of the parameters, so that ranges differ.
    torch.testing.assert_close(flat(list(model.parameters())), flat(list(twin.parameters())),
                               rtol=0.2, atol=0.02)  # fmt: skip
    assert same_on_all_ranks(group, list(model.parameters()))
    assert state.stats()["link_bytes_sent"] == optimizer.stats()["link_bytes_sent"]


def test_behind_a_communication_hook(pool):
    pool.run(4, in_a_hook)


def missing_gradients(group):
    """A parameter that no worker has a gradient for keeps its memory."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR, density=DENSITY, momentum=0.0, process_group=group,
                             memory_decay=0.9, weight_decay=0.1, **TWO_SIDED)  # fmt: skip
    for step in range(3):
        set_gradients(params, rank, step)
        optimizer.step()
    u, w = whole_of(group, optimizer, params), flat(params)
    set_gradients(params, rank, 3)
    g = mean(group, flat([p.grad for p in params]))
    absent = params[0]
    absent.grad = None
    optimizer.step()
    there = flat([torch.full_like(p, float(p is not absent)) for p in params])
    kept = torch.where(there > 0, 0.9 * u + g + 0.1 * w, u)
    found = whole_of(group, optimizer, params) + aggregate_of(optimizer, params)
    torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)


def test_parameters_without_a_gradient(pool):
    pool.run(4, missing_gradients)


def test_a_wrong_exchange_is_named():
    with pytest.raises(ValueError, match="exchange: got 'ring', must be 'all_gather' or 'reduce_"):
        gmc_cuda.GMC([torch.nn.Parameter(Tensor(3))], lr=0.1, exchange="ring")
    assert ops.CALLED_OFF == reference.CALLED_OFF


# ------------------------------------------------------------------- buckets of whatever size


@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, FLOAT4])
@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_all_workers_plan_alike_whatever_the_size(size, wire_dtype):
    rule = GlobalMomentum()
    group = {**gmc_cuda.GMC([torch.nn.Parameter(torch.ones(1))], lr=1.0).param_groups[0],
             "density": None, "bytes_ratio": 100.0}  # fmt: skip
    for numel in range(1, 1000, 1 if size < 8 else 7):
        plans = [
            rule.plan(group, SimpleNamespace(numel=numel, owner=object(), params=[None]),
                      wire_dtype, SimpleNamespace(size=size, rank=rank))
            for rank in range(size)
        ]  # fmt: skip
        assert len({plan.size() for plan in plans}) == 1, numel
        for part in plans[0].parts:
            assert 1 <= part.k <= min(part.numel, plans[0].parts[0].k), numel


def small_bucket(group, numel, wire_dtype):
    rank = dist.get_rank(group)
    params = [torch.nn.Parameter(torch.zeros(numel))]
    optimizer = gmc_cuda.GMC(params, lr=LR, bytes_ratio=100, wire_dtype=wire_dtype,
                             process_group=group, **TWO_SIDED)  # fmt: skip
    for step in range(3):
        set_gradients(params, rank, step)
        came_in = whole_of(group, optimizer, params) + mean(group, params[0].grad)
        came_in += 0.9 * aggregate_of(optimizer, params)
        optimizer.step()
        left = whole_of(group, optimizer, params) + aggregate_of(optimizer, params)
        torch.testing.assert_close(left, came_in, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "numel", "wire"), [(2, 54, FLOAT4), (3, 88, torch.bfloat16)])
def test_a_bucket_whose_last_range_is_short(pool, size, numel, wire):
    pool.run(size, small_bucket, numel, wire)


# ------------------------------------------------- what waits while layers are frozen, and copies


def frozen_over_a_checkpoint(group, folder):
    """Two frozen layers of one size, of which each worker owns another part."""
    rank = dist.get_rank(group)

    def make():
        params = [torch.nn.Parameter(torch.ones(n)) for n in (64, 128, 64)]
        model = torch.nn.ParameterList(params)
        return (
            model,
            params,
            gmc_cuda.GMC(params, lr=LR, density=0.1, process_group=group, **TWO_SIDED),
        )

    model, params, optimizer = make()
    for step in range(5):
        for p in params[::2] if step == 3 else []:
            p.requires_grad_(False)
            p.grad = None
        set_gradients([p for p in params if p.requires_grad], rank, step)
        optimizer.step()
    gmc_cuda.checkpoint.save(folder, model, optimizer)
    model, params, resumed = make()
    for p in params[::2]:
        p.requires_grad_(False)
    gmc_cuda.checkpoint.load(folder, model, resumed)
    before = [whole_of(group, resumed, [p]) for p in params]
    resumed.average_memory_()
    for p, unsent in zip(params, before, strict=True):
        assert unsent.any()
        torch.testing.assert_close(whole_of(group, resumed, [p]), unsent, rtol=1e-5, atol=1e-6)


def test_memory_of_frozen_layers_is_averaged_after_a_checkpoint(pool, tmp_path):
    pool.run(2, frozen_over_a_checkpoint, str(tmp_path))


def other_workers(say, options):
    """Fewer workers go on, one layer frozen; then each of them alone."""
    rank = dist.get_rank()
    groups = {members: dist.new_group(list(members)) for members in ((0, 1), (0,), (1,), (2,))}
    params = [torch.nn.Parameter(torch.ones(n)) for n in (640, 1280)]
    optimizer = gmc_cuda.GMC(params, lr=LR, **options)
    for step in range(3):
        set_gradients(params, rank, step)
        optimizer.step()
    params[0].requires_grad_(False)
    params[0].grad = None
    for members in ((0, 1), (rank,)):
        if rank not in members:
            continue
        before = memory_of(optimizer, params)
        optimizer.process_group = groups[members]
        torch.testing.assert_close(memory_of(optimizer, params), before)
        for step in range(2):
            set_gradients(params[1:], rank, step)
            optimizer.step()
        assert same_on_all_ranks(groups[members], params[1:])
        before = memory_of(optimizer, params[:1])
    params[0].requires_grad_(True)
    optimizer.stats()
    torch.testing.assert_close(memory_of(optimizer, params[:1]), before)
    assert before.any()


@pytest.mark.parametrize(
    "options", [TWO_SIDED | {"density": 0.1}, {"bytes_ratio": 30}, {"density": 0.1}]
)
def test_fewer_workers_go_on(tmp_path, options):
    with Workers(3, tmp_path, other_workers, options) as workers:
        workers.results()


def rare_rows(group):
    """Rows that nobody has used yet are sent as zeros by all, as in an embedding by frequency."""
    rank = dist.get_rank(group)
    param = torch.nn.Parameter(torch.zeros(4000))
    optimizer = gmc_cuda.GMC([param], lr=LR, process_group=group, **TWO_SIDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            param.grad = torch.zeros(4000)
            param.grad[:400] = torch.randn(400) * (rank + 1)
            optimizer.step()


def test_what_nobody_has_used_yet_is_no_duplicate(pool):
    pool.run(2, rare_rows)
