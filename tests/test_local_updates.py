"""LocalUpdates: rounds of inner steps, against closed forms, with any inner optimizer."""

import copy
import functools
import io
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import gmc_cuda
from support.problems import (
    aggregate_of,
    flat,
    mean,
    memory_of,
    parameters,
    same_on_all_ranks,
    set_gradients,
)

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


def late(group, density, ahead):
    """overlap: a round's moves are applied one round later; until then each worker keeps its.

    What it has not sent it keeps for good if it steps ahead.
    """
    rank = dist.get_rank(group)
    params = parameters()
    options = {"lr": 0.7, "momentum": 0.5, "density": density}
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.01),
        gmc(group, **options),
        H,
        overlap=True,
        step_ahead=ahead,
    )
    twins = parameters()
    inner = torch.optim.SGD(twins, lr=0.01)
    starts = [torch.nn.Parameter(t.detach().clone()) for t in twins]
    outer = gmc(group, **options)(starts)
    begun = [t.detach().clone() for t in twins]
    own = None  # what is on its way
    for step in range(5 * H):
        set_gradients(params, rank, step)
        set_gradients(twins, rank, step)
        optimizer.step()
        inner.step()
        if (step + 1) % H:
            continue
        with torch.no_grad():
            moved = [b - t for b, t in zip(begun, twins, strict=True)]
        waits = [torch.zeros_like(t) for t in twins]
        if own is not None:  # the round before has arrived
            for start, sent in zip(starts, own, strict=True):
                start.grad = sent
            outer.step()
            waits = [ahead * outer.state[s]["memory"] for s in starts]
        own = moved
        with torch.no_grad():
            begun = [s - w - m for s, w, m in zip(starts, waits, moved, strict=True)]
            for twin, value in zip(twins, begun, strict=True):
                twin.copy_(value)
        torch.testing.assert_close(flat(params), flat(twins), rtol=1e-6, atol=1e-7)
        assert same_on_all_ranks(group, optimizer.outer.param_groups[0]["params"])
        assert not same_on_all_ranks(group, params)
    with pytest.raises(RuntimeError, match=r"call optimizer.synchronize\(\) on all workers before"):
        optimizer.state_dict()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    assert torch.equal(flat(params), flat(optimizer.outer.param_groups[0]["params"]))
    optimizer.state_dict()


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_overlap_is_one_round_late(pool, density, ahead):
    pool.run(2, late, density, ahead)


def mass(group, decay, ahead):
    """ubar + a_t = d * ubar + mean(b_k - w_k) + beta * a_{t-1}, for the outer optimizer.

    b_k = w - step_ahead * u_k is where worker k began the round.
    """
    rank = dist.get_rank(group)
    params = parameters(torch.bfloat16)
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.AdamW(params, lr=0.01),
        gmc(group, lr=0.7, momentum=0.5, density=0.05, memory_decay=decay),
        H,
        step_ahead=ahead,
    )
    outer, start = optimizer.outer, optimizer.outer.param_groups[0]["params"]
    for step in range(5 * H):
        set_gradients(params, rank, step)
        optimizer.inner.step()  # what LocalUpdates does, looked at from outside
        moved = flat(
            [(s - ahead * memory_of(outer, [s]).view_as(s)).to(torch.bfloat16) for s in start]
        )
        moved -= flat(params)
        before = mean(group, memory_of(outer, start)), aggregate_of(outer, start)
        w = flat(start)
        optimizer._since += 1
        if optimizer._since == H:
            optimizer._end_round()
            ubar, a = mean(group, memory_of(outer, start)), aggregate_of(outer, start)
            came = decay * before[0] + mean(group, moved) + 0.5 * before[1]
            torch.testing.assert_close(ubar + a, came, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(flat(start), w - 0.7 * a, rtol=1e-6, atol=1e-6)
            assert same_on_all_ranks(group, params) == (ahead == 0)
    optimizer.synchronize()
    assert torch.equal(flat(params), flat([s.to(torch.bfloat16) for s in start]))
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_mass_equation_of_the_outer_optimizer(pool, decay, ahead):
    pool.run(2, mass, decay, ahead)


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


def ahead(group, share, exchange, make):
    """After a round each worker is where it would be if a share of its memory had been applied."""
    rank, params = dist.get_rank(group), parameters()
    outer = functools.partial(
        make, process_group=group, lr=0.7, momentum=0.5, density=0.05, exchange=exchange
    )
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H, step_ahead=share)
    copies = optimizer.outer.param_groups[0]["params"]

    def waits():
        return flat([optimizer.outer.state[c]["memory"] for c in copies])

    for step in range(4 * H):
        set_gradients(params, rank, step)
        optimizer.step()
        if (step + 1) % H == 0:
            for p, copy in zip(params, copies, strict=True):
                waiting = share * optimizer.outer.state[copy]["memory"]
                assert torch.equal(p.detach(), copy.detach() - waiting)
            assert same_on_all_ranks(group, copies)
            assert same_on_all_ranks(group, params) == (share == 0)
    # Averaged memory makes the workers equal, and what was moved in a round stays so.
    set_gradients(params, rank, 4 * H)
    twins, twin = deepcopy((params, optimizer)) if share else (params, optimizer)
    twin.process_group = group
    twin.average_memory_()
    assert same_on_all_ranks(group, twins)
    before = flat(params)
    optimizer.step()
    moved = before - flat(params)
    begun = flat(params) + moved
    optimizer.average_memory_()
    torch.testing.assert_close(
        flat(copies) - share * waits() - flat(params), moved, rtol=1e-4, atol=1e-6
    )
    assert share == 0 or not torch.equal(flat(params) + moved, begun)
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    assert torch.equal(flat(params), flat(copies))
    assert waits().any(), "what was not sent waits on"
    before = waits()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # the next round begins ahead again
    torch.testing.assert_close(flat(params), flat(copies) - share * before)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_worker_goes_on_ahead_of_what_it_has_sent(pool, share, exchange, make):
    pool.run(2, ahead, share, exchange, make)


def frozen_within(group, at, overlap):
    """A layer that is frozen rests at the common values, and goes on from them."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=0.7, density=0.05)
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H, overlap=overlap)
    for step in range(8 * H):
        if step == at:
            params[0].requires_grad_(False)
        if step == at + 3 * H:
            assert same_on_all_ranks(group, params[:1])
            assert torch.equal(params[0].detach(), optimizer._copies[params[0]].detach())
            params[0].requires_grad_(True)
        optimizer.zero_grad()
        set_gradients([p for p in params if p.requires_grad], rank, step)
        optimizer.step()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [2 * H, 2 * H + 1])
def test_a_frozen_layer_rests_at_the_common_values(pool, at, overlap):
    pool.run(2, frozen_within, at, overlap)


# ----------------------------------------------------- weights that are loaded, and rounds' lengths


def loaded(group, ranks, dtype):
    """Weights that are written between construction and the first step are where it begins."""
    rank, params, twins = dist.get_rank(group), parameters(dtype), parameters(dtype)
    torch.manual_seed(5)
    values = [torch.randn_like(p) for p in params]
    if 0 in ranks:
        for twin, value in zip(twins, values, strict=True):
            twin.data.copy_(value)
    outer = gmc(group, lr=0.5, momentum=0.0, density=1.0)  # half of what counts as movement
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H)
    twin = gmc_cuda.LocalUpdates(torch.optim.SGD(twins, lr=0.1), outer, H)
    if rank in ranks:
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)
    saved = deepcopy(optimizer.state_dict()) if rank == 0 else None  # no collective
    for step in range(2 * H):
        for each, own in ((optimizer, params), (twin, twins)):
            generator = torch.Generator().manual_seed(100 * step + rank)
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            each.step()
    optimizer.synchronize()
    twin.synchronize()
    assert same_on_all_ranks(group, params)
    # A worker that began its first round elsewhere has rounded what it moved in another way.
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(flat(params), flat(twins), rtol=error, atol=error)
    if rank == 0 and 0 in ranks:
        for i, value in enumerate(values):
            assert torch.equal(saved["state"][i]["outer.start"], value.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[0, 1], [0], [1]])
def test_weights_may_be_loaded_after_construction(pool, ranks, dtype):
    pool.run(2, loaded, ranks, dtype)


def resumed_with_more_trained(group):
    """A layer that was frozen when the state was saved begins with the loaded weights."""
    rank, params = dist.get_rank(group), parameters()
    params[0].requires_grad_(False)
    optimizer = plain(params, process_group=group)
    for step in range(H):
        set_gradients(params[1:], rank, step)
        optimizer.step()
    others = [Parameter(torch.zeros_like(p)) for p in params]
    again = plain(others, process_group=group)
    saved = deepcopy(optimizer.state_dict())
    assert "outer.start" not in saved["state"].get(0, {})
    again.load_state_dict(saved)
    for other, p in zip(others, params, strict=True):
        other.data.copy_(p)
    for _ in range(H):
        for other in others:
            other.grad = torch.zeros_like(other)
        again.step()
    torch.testing.assert_close(flat(others), flat(params))


def test_a_layer_without_saved_start_begins_with_its_weights(pool):
    pool.run(2, resumed_with_more_trained)


def other_length(group, how):
    """A change of H within a round leaves no movement on one worker."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=0.7, density=0.05)
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, 20)
    for step in range(8):
        set_gradients(params, rank, step)
        optimizer.step()
    if how == "resumed":
        others = deepcopy(params)
        again = gmc_cuda.LocalUpdates(torch.optim.SGD(others, lr=0.1), outer, 4)
        for other, p in zip(others, params, strict=True):
            other.data.copy_(p)
        again.load_state_dict(deepcopy(optimizer.state_dict()))
        params, optimizer = others, again
    else:
        optimizer.every = 4
    if how == "frozen":
        params[0].requires_grad_(False)
        set_gradients(params[1:], rank, 8)
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.stats()["steps"] == 1, "the round was over"
    optimizer.synchronize()
    assert optimizer.stats()["steps"] == 1
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("how", ["resumed", "live", "frozen"])
def test_another_length_of_rounds(pool, how):
    pool.run(2, other_length, how)


def refused_each_time(group):
    """With rounds of one step too, a refused exchange leaves the round open."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=1.0, momentum=0.0, density=0.5)
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, 1)
    set_gradients(params, rank, 0)
    optimizer.step()
    optimizer.synchronize()
    optimizer.outer.param_groups[0]["density"] = 2.0
    set_gradients(params, rank, 1)
    with pytest.raises(ValueError, match="density of param group 0"):
        optimizer.step()
    optimizer.outer.param_groups[0]["density"] = 0.5
    assert not same_on_all_ranks(group, params)
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)


def test_a_refused_exchange_is_made_by_synchronize(pool):
    pool.run(2, refused_each_time)


def test_the_first_skipped_round_is_said():
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(torch.optim.AdamW(params, lr=0.01), every=1)
    for step in range(2):
        set_gradients(params, 0, step)
        params[1].grad[0] = torch.nan if step else 0.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said = [str(warning.message) for warning in caught if "skipped" in str(warning.message)]
        assert len(said) == step
    assert said[0].startswith("a step was skipped")
    assert "It was a round of LocalUpdates" in said[0]


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
    optimizer.synchronize()
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
    assert dict(optimizer.state) == inner.state
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


def written_between_rounds(group, at, overlap, ahead):
    """Weights are written to, as WGAN clips them, on one worker more than on the other."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=1.0, momentum=0.0, density=0.1)
    inner = torch.optim.SGD(params, lr=0.1)
    optimizer = gmc_cuda.LocalUpdates(inner, outer, H, overlap=overlap, step_ahead=ahead)
    for step in range(at):
        set_gradients(params, rank, step)
        optimizer.step()
        with torch.no_grad():
            for p in params:
                p.clamp_(-0.5 - rank, 0.5)
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    rounds = optimizer.stats()["steps"]
    optimizer.synchronize()
    assert optimizer.stats()["steps"] == rounds, "nothing had moved"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ahead", [0.0, 1.0])
@pytest.mark.parametrize("at", [2 * H, 2 * H + 1])
def test_synchronize_exchanges_what_was_written_after_a_round(pool, at, ahead, overlap):
    pool.run(2, written_between_rounds, at, overlap, ahead)


def loaded_and_synchronized(group):
    rank, params = dist.get_rank(group), parameters()
    optimizer = plain(params, process_group=group)
    with torch.no_grad():
        params[1].add_(1.0 + rank)
    expected = flat(params)
    dist.broadcast(expected, 0, group=group)
    optimizer.synchronize()
    assert torch.equal(flat(params), expected)


def test_synchronize_before_the_first_step_takes_over_loaded_weights(pool):
    pool.run(2, loaded_and_synchronized)


def frozen_with_a_gradient(group, at):
    """The inner optimizer still moves a layer that was frozen after its backward pass."""
    rank, params = dist.get_rank(group), parameters()
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.1), gmc(group, lr=1.0, momentum=0.0, density=1.0), H
    )
    for step in range(at + 2 * H):
        set_gradients(params, rank, step)
        if step == at:
            params[1].requires_grad_(False)
        if step > at:
            params[1].grad = None
        before = params[1].detach().clone()
        optimizer.step()
        if step == at:
            assert not torch.equal(params[1], before)
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("at", [H - 1, H, H + 1])
def test_a_layer_frozen_with_a_gradient_is_exchanged(pool, at):
    pool.run(2, frozen_with_a_gradient, at)


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
    for ahead in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="step_ahead: got .*, must be between 0 and 1"):
            gmc_cuda.LocalUpdates(inner, step_ahead=ahead)
    with pytest.raises(TypeError, match="step_ahead: got str, must be a number"):
        gmc_cuda.LocalUpdates(inner, step_ahead="1")
    with pytest.raises(TypeError, match=r"inner_optimizer: got list, must be a torch.optim.Opt"):
        gmc_cuda.LocalUpdates(params)
    optimizer = gmc_cuda.LocalUpdates(inner)
    for name in ("every", "step_ahead"):
        with pytest.raises(ValueError, match=f"{name}: got -1, must be"):
            setattr(optimizer, name, -1)
    with pytest.raises(ValueError, match="got the state of an inner optimizer alone"):
        optimizer.load_state_dict(inner.state_dict())
    with pytest.raises(ValueError, match="got the state of GMC, must be of LocalUpdates"):
        optimizer.load_state_dict(gmc_cuda.GMC(params, 0.7).state_dict())
    other = gmc_cuda.LocalUpdates(torch.optim.SGD(params[:3], lr=0.1))
    with pytest.raises(ValueError, match="got 3 parameters, must be 6"):
        optimizer.load_state_dict(other.state_dict())


# ------------------------------------------------------------------- what users change meanwhile


def plain(params, **options):
    """Rounds whose outer step is the mean of the workers' parameters."""
    outer = functools.partial(gmc_cuda.GMC, lr=1.0, momentum=0.0, density=1.0, **options)
    return gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H)


def averaging(group, change):
    """At density 1, lr 1 a round ends with the mean of what the workers have, whatever changed."""
    rank = dist.get_rank(group)
    params = parameters()
    optimizer = plain(params, process_group=group)
    twin = torch.optim.SGD(parameters(), lr=0.1)
    for step in range(4 * H):
        for each in (optimizer, twin):
            CHANGES[change](each, step)
            trained = [p for g in each.param_groups for p in g["params"] if p.requires_grad]
            set_gradients(trained, rank, step)
            each.step()
            each.zero_grad()
        own, twins = ([p for g in o.param_groups for p in g["params"]] for o in (optimizer, twin))
        if (step + 1) % H == 0:
            for p in twins:
                p.data.copy_(mean(group, p.detach()))
            assert same_on_all_ranks(group, own)
        torch.testing.assert_close(flat(own), flat(twins), rtol=1e-5, atol=1e-6)
    copies = [p for g in optimizer.outer.param_groups for p in g["params"]]
    assert len(copies) == len(own)
    assert len(optimizer.outer.state) == len(own)


def freeze(first, last):
    def change(each, step):
        for p in each.param_groups[0]["params"][1:3]:
            if step == first:
                p.requires_grad_(False)
            if step == last:
                p.requires_grad_(True)

    return change


def replace(at):
    def change(each, step):
        if step == at:
            torch.manual_seed(3)
            each.param_groups[0]["params"][2] = Parameter(torch.randn(9, 9))

    return change


def removed(at):
    def change(each, step):
        if step == at:
            each.state.pop(each.param_groups[0]["params"].pop(1), None)

    return change


def add(at):
    def change(each, step):
        if step == at:
            torch.manual_seed(3)
            each.add_param_group({"params": [Parameter(torch.randn(6, 5))], "lr": 0.05})

    return change


def append(at):
    def change(each, step):
        if step == at:
            each.param_groups[0]["params"].append(Parameter(torch.ones(4)))

    return change


def other_strides(at):
    def change(each, step):
        p = each.param_groups[0]["params"][0]
        if step == at:
            p.data = p.data.t().contiguous().t()

    return change


# Steps 3, 6 and 9 begin a round of three; the others lie within one.
CHANGES = {
    "frozen and unfrozen between rounds": freeze(3, 9),
    "frozen and unfrozen within rounds": freeze(4, 10),
    "frozen within a round, unfrozen at its end": freeze(4, 6),
    "frozen and unfrozen within one round": freeze(3, 5),
    "replaced between rounds": replace(3),
    "replaced within a round": replace(4),
    "removed between rounds": removed(3),
    "removed within a round": removed(5),
    "added between rounds": add(6),
    "added within a round": add(7),
    "appended": append(3),
    "appended within a round": append(5),
    "other strides": other_strides(4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_users_change_is_followed(pool, change):
    pool.run(2, averaging, change)


def unfrozen(group, dtype, overlap, every, values_differ):
    """Layers are frozen and unfrozen in any step; at the end all workers have the same."""
    rank = dist.get_rank(group)
    params = parameters(dtype)
    if values_differ and rank:
        with torch.no_grad():
            for p in params:
                p.add_(1.0)
    for p in params[2:]:
        p.requires_grad_(False)
    outer = gmc(group, lr=0.7, momentum=0.5, density=0.05)
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.AdamW(params, lr=0.01), outer, every, overlap=overlap
    )
    for step in range(14):
        for i, p in enumerate(params):
            p.requires_grad_((step + i) % 5 != 0 if step > 2 else i < 2)
        set_gradients([p for p in params if p.requires_grad], rank, step)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype,values_differ", [(torch.float32, True), (torch.bfloat16, False)])
def test_replicas_stay_equal_through_gradual_unfreezing(pool, dtype, overlap, every, values_differ):
    pool.run(2, unfrozen, dtype, overlap, every, values_differ)


def values_that_differ(group, overlap):
    """A parameter that comes in within a round starts with rank 0's values."""
    rank, params = dist.get_rank(group), parameters()
    outer = functools.partial(gmc_cuda.GMC, lr=1.0, momentum=0.0, density=1.0, process_group=group)
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H, overlap=overlap)
    new = Parameter(torch.full((4,), 1.0 + rank))
    for step in range(2 * H):
        if step == 1:
            optimizer.param_groups[0]["params"].append(new)
        set_gradients(params, rank, step)
        new.grad = torch.full((4,), float(rank))
        optimizer.step()
    optimizer.synchronize()
    assert same_on_all_ranks(group, [*params, new])
    torch.testing.assert_close(new.detach(), torch.full((4,), 1.0 - 0.1 * 0.5 * (2 * H - 1)))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_new_parameter_starts_with_rank_0s_values(pool, overlap):
    pool.run(2, values_that_differ, overlap)


def waiting(group):
    """What a layer has not sent waits while it is frozen, in the outer memory; the layer rests."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=0.7, momentum=0.5, density=0.05)
    optimizer = gmc_cuda.LocalUpdates(torch.optim.SGD(params, lr=0.1), outer, H)

    def train(steps):
        for step in steps:
            set_gradients([p for p in params if p.requires_grad], rank, step)
            optimizer.step()
            optimizer.zero_grad()

    def memory():
        return optimizer.outer.state[optimizer._copies[params[0]]]["memory"].clone()

    train(range(H))
    params[0].requires_grad_(False)
    before = memory()
    assert before.any()
    train(range(H, H + 1))
    weights = flat(params[:1])
    assert torch.equal(weights, flat([optimizer._copies[params[0]]])), "the common values"
    train(range(H + 1, 3 * H))
    assert torch.equal(memory(), before)
    assert torch.equal(flat(params[:1]), weights)
    saved = deepcopy(optimizer.state_dict())
    params[0].requires_grad_(True)
    train(range(3 * H, 5 * H))
    assert not torch.equal(memory(), before)
    assert not torch.equal(flat(params[:1]), weights)
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    # A new process, in which the layer has never been trained, has it as well.
    others = parameters()
    others[0].requires_grad_(False)
    fresh = gmc_cuda.LocalUpdates(torch.optim.SGD(others, lr=0.1), outer, H)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.outer.state[fresh._copies[others[0]]]["memory"], before)


def test_what_a_frozen_layer_has_not_sent_waits_for_it(pool):
    pool.run(2, waiting)


def test_weights_written_to_while_frozen_count():
    params = parameters()
    optimizer = plain(params)
    params[0].requires_grad_(False)
    set_gradients(params[1:], 0, 0)
    optimizer.step()
    with torch.no_grad():
        params[0].fill_(3.0)
    params[0].requires_grad_(True)
    for _ in range(2 * H):
        optimizer.zero_grad()
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.full_like(params[0], 3.0))


def test_all_frozen_at_first():
    params = [p.requires_grad_(False) for p in parameters()]
    optimizer = plain(params)
    for step in range(2 * H):
        if step == 2:
            params[1].requires_grad_(True)
        set_gradients([p for p in params if p.requires_grad], 0, step)
        optimizer.step()
    assert not torch.equal(params[1].detach(), parameters()[1].detach())


@pytest.fixture
def swapped():
    """Conversions keep the Parameter objects, as .cuda() does on a GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_a_model_moves(swapped, at, overlap):
    """ "meta" stands for the GPU: it has no values, but whatever mixes it with the CPU fails."""
    model = torch.nn.Linear(8, 8)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gmc_cuda.LocalUpdates(inner, every=H, overlap=overlap)
    for step in range(4 * H):
        if step == at:
            model.to("meta")
        optimizer.zero_grad()
        x = torch.randn(2, 8, device=model.weight.device)
        model(x).sum().backward()
        optimizer.step()
    optimizer.synchronize()
    assert all(p.device.type == "meta" for p in optimizer._copies.values())


def test_a_model_is_converted():
    model = torch.nn.Linear(8, 8)
    optimizer = plain(model.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        for _ in range(H + 1):
            optimizer.zero_grad()
            model(torch.randn(2, 8, dtype=dtype)).sum().backward()
            optimizer.step()
    before = model.weight.detach().clone(), len(optimizer.inner.state)
    optimizer.zero_grad()
    model.double()
    model(torch.randn(2, 8).double()).sum().backward()
    with pytest.raises(TypeError, match=r"parameter 0 of group 0: got torch.float64.*model.float"):
        optimizer.step()
    assert torch.equal(model.weight.detach().float(), before[0])
    model.float()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
def test_what_float32_cannot_hold_is_refused_or_left_alone(dtype):
    odd, params = Parameter(torch.ones(4, dtype=dtype)), parameters()
    refused = rf"parameter 6 \('odd'\) of group 0: got {dtype}, must be dense torch.float32"
    named = [(f"p{i}", p) for i, p in enumerate(params)] + [("odd", odd)]
    with pytest.raises(TypeError, match=refused):
        plain(named)
    assert torch.equal(odd.detach(), torch.ones(4, dtype=dtype))
    odd.requires_grad_(False)
    optimizer = plain(named)
    set_gradients(params, 0, 0)
    optimizer.step()
    odd.requires_grad_(True)
    odd.grad = torch.ones_like(odd)
    weights, steps = flat(params), optimizer._since
    with pytest.raises(TypeError, match=refused):
        optimizer.step()
    assert torch.equal(flat(params), weights)
    assert optimizer._since == steps
    assert torch.equal(odd.detach(), torch.ones(4, dtype=dtype))
    odd.requires_grad_(False)
    optimizer.step()


@pytest.mark.parametrize("model_too", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_made_under_inference_mode(overlap, model_too):
    model = torch.nn.Linear(4, 4)
    with torch.inference_mode():
        optimizer = gmc_cuda.LocalUpdates(
            torch.optim.AdamW(model.parameters()), every=2, overlap=overlap
        )
        if model_too:
            optimizer.add_param_group({"params": [Parameter(torch.ones(3), requires_grad=False)]})
            optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()


# ------------------------------------------------------------------------------ errors on one rank


def bad_argument(group, case):
    rank, params = dist.get_rank(group), parameters()
    outer, every, inner = gmc(group, lr=0.7), H, torch.optim.SGD
    mine = rank == 1
    if case == "every" and mine:
        every = 0
    if case == "dtype" and mine:
        params[1] = Parameter(torch.ones(5, dtype=torch.float64))
    if case == "dtype, by a function":
        params[1] = Parameter(torch.ones(5, dtype=torch.float64)) if mine else params[1]
        outer = lambda params: gmc_cuda.DGC(params, 0.7, process_group=group)  # noqa: E731
    if case == "option" and mine:
        outer = gmc(group, lr=-1.0)
    if case == "keyword" and mine:
        outer = gmc(group, lr=0.7, densty=0.1)
    if case == "an optimizer" and mine:
        outer = torch.optim.SGD(parameters(), lr=0.1)
    if case == "frozen" and mine:
        params[4].requires_grad_(False)
    if case == "inner" and mine:
        inner = torch.optim.AdamW
    inner = inner(params, lr=0.1)
    with pytest.raises(Exception) as raised:
        gmc_cuda.LocalUpdates(inner, outer, every)
    good = parameters()
    optimizer = plain(good, process_group=group)  # all is still in step
    for step in range(H):
        set_gradients(good, rank, step)
        optimizer.step()
    assert same_on_all_ranks(group, good)
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    "case,own,reason",
    [
        ("every", "ValueError", "every: got 0"),
        ("dtype", "TypeError", "parameter 1 of group 0: got torch.float64"),
        ("dtype, by a function", "TypeError", "parameter 1 of group 0: got torch.float64"),
        ("option", "ValueError", "lr of param group 0: got -1.0"),
        ("keyword", "TypeError", "densty"),
        ("frozen", "ValueError", "number of parameters"),
        ("inner", "ValueError", "inner optimizer: 'SGD' on rank 0, 'AdamW' on rank 1"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(pool, case, own, reason):
    told = pool.run(2, bad_argument, case)
    assert told[1].startswith(own)
    assert all(
        reason in text and "rank 1" in (text + "rank 1" * (r == 1)) for r, text in enumerate(told)
    )


def added_on_one(group):
    rank, params = dist.get_rank(group), parameters()
    optimizer = plain(params, process_group=group)
    new = Parameter(torch.full((4,), float(rank)))
    for bad in (
        {"params": [Parameter(torch.ones(2, dtype=torch.float64))]},
        {"params": [params[0]]},
        {"params": [Parameter(torch.ones(3))]},
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            optimizer.add_param_group(bad if rank else {"params": [new]})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [new]})
    assert torch.equal(new.detach(), torch.zeros(4))
    for step in range(H):
        set_gradients([*params, new], rank, step)
        optimizer.step()
    assert same_on_all_ranks(group, [*params, new])


def test_an_error_in_add_param_group_changes_nothing(pool):
    pool.run(2, added_on_one)


def failing(group, overlap, when):
    """A round whose exchange is called off neither loses nor doubles what was moved."""
    rank, params, twins = dist.get_rank(group), parameters(), parameters()
    options = {"lr": 1.0, "momentum": 0.0, "density": 1.0}
    optimizer, twin = (
        gmc_cuda.LocalUpdates(
            torch.optim.SGD(ps, lr=0.1), gmc(group, **options), H, overlap=overlap
        )
        for ps in (params, twins)
    )
    start = mean(group, flat(params))
    moves = torch.zeros_like(start)
    for step in range(4 * H):
        for ps in (params, twins):
            generator = torch.Generator().manual_seed(100 * step + rank)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator)
        moves -= 0.1 * mean(group, flat([p.grad for p in params]))
        twin.step()
        if step != 2 * H - 1:
            optimizer.step()
            continue
        with pytest.MonkeyPatch.context() as patch:
            if when == "option":
                patch.setitem(optimizer.outer.param_groups[0], "lr", -1.0)
            elif when == "finish":
                patch.setattr(optimizer.outer.engine.round, "finish", _raise)
            else:
                patch.setattr(gmc_cuda.ops, "accumulate_", _raise)
            with pytest.raises((ValueError, KeyError)):
                optimizer.step()
    optimizer.synchronize()
    optimizer.synchronize()
    for _ in range(H):  # what is in memory goes with the next round
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)
    torch.testing.assert_close(flat(params), start + moves, rtol=1e-5, atol=1e-5)


def _raise(*args, **kwargs):
    raise KeyError("mine")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("when", ["option", "finish", "begin"])
def test_a_failed_exchange_loses_and_doubles_nothing(pool, overlap, when):
    pool.run(2, failing, overlap, when)


def changed_on_one(group, overlap, option, value):
    """With overlap the other worker learns of it one round later, and both stay in step."""
    rank, params = dist.get_rank(group), parameters()
    outer = gmc(group, lr=1.0, momentum=0.0, density=0.2, wire_dtype=torch.float32)
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.1), outer, H, overlap=overlap, step_ahead=0.0
    )
    own, errors = optimizer.outer.param_groups[0], []
    start, right = mean(group, flat(params)), own[option]
    came_in = torch.zeros_like(start)
    for step in range(6 * H):
        set_gradients(params, rank, step)
        came_in += flat([p.grad for p in params])
        if step == H and rank == 0:
            own[option] = value
        try:
            optimizer.step()
        except ValueError as error:
            errors.append(f"{option} of group 0" in str(error))
            own[option] = right
    optimizer.synchronize()
    assert all(errors)
    assert errors
    assert same_on_all_ranks(group, params)
    left = mean(group, memory_of(optimizer.outer, optimizer.outer.param_groups[0]["params"]))
    came_in = mean(group, came_in)
    torch.testing.assert_close(flat(params) - left, start - 0.1 * came_in, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option,value,overlap", [("density", 0.1, False), ("density", 0.1, True), ("lr", 0.5, False)]
)
def test_an_option_changed_on_one_worker(pool, option, value, overlap):
    pool.run(2, changed_on_one, overlap, option, value)


# ---------------------------------------------------------------------- state, saving and copying


def through_torch_save(value, weights_only=False):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


def test_a_flattened_state_is_refused_at_load():
    """torch reads it by what optimizer.state holds, which is the inner optimizer's."""
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(torch.optim.AdamW(params, lr=0.01), every=H)
    set_gradients(params, 0, 0)
    optimizer.step()
    model, before = torch.nn.ParameterList(params), optimizer.state_dict()
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    with pytest.raises(ValueError, match=r"StateDictOptions\(flatten_optimizer_state_dict=False\)"):
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved), options=how)
    after = optimizer.state_dict()
    assert all(
        torch.equal(value, after["state"][i][name])
        for i, entry in before["state"].items()
        for name, value in entry.items()
    )


def as_before(state_dict, outer):
    """The state_dict as earlier versions made it."""
    state, keys = {}, [k for k in state_dict["state"][0] if k.startswith("outer.")]
    for i, entry in state_dict["state"].items():
        state[i] = {k: v for k, v in entry.items() if k not in keys}
    (group,) = state_dict["param_groups"]
    own = group["local_updates"]
    return {
        "state": state,
        "param_groups": [{k: v for k, v in group.items() if k != "local_updates"}],
        "local_updates": {
            "outer": outer,
            "start": [entry["outer.start"] for entry in state_dict["state"].values()],
            "steps": 5 * H + own["since"],
        },
    }


def goes_on(group, way, stop, make):
    rank = dist.get_rank(group)
    outer = functools.partial(make, process_group=group, lr=0.7, density=0.05)

    def train(params, optimizer, steps):
        for step in steps:
            set_gradients(params, rank, step)
            optimizer.step()

    params = parameters()
    options = {"step_ahead": 0.0} if way == "as before" else {}
    optimizer = gmc_cuda.LocalUpdates(torch.optim.AdamW(params, lr=0.01), outer, H, **options)
    train(params, optimizer, range(stop))
    if way in COPIES:
        again, others = COPIES[way]((optimizer, params))
        if way != "deepcopy":
            with pytest.raises(RuntimeError, match="set optimizer.process_group"):
                again.synchronize() if stop % H else again.outer.step()
            again.process_group = group
    else:
        others = parameters()
        again = gmc_cuda.LocalUpdates(torch.optim.AdamW(others, lr=0.01), outer, H, **options)
        with torch.no_grad():
            for p, weight in zip(others, params, strict=True):
                p.copy_(weight)
        if way == "torch's":
            model, other = torch.nn.ParameterList(params), torch.nn.ParameterList(others)
            saved = deepcopy(get_optimizer_state_dict(model, optimizer))
            set_optimizer_state_dict(other, again, saved)
        elif way == "as before":
            saved = as_before(optimizer.state_dict(), optimizer.outer.state_dict())
            again.load_state_dict(deepcopy(saved))
        else:
            again.load_state_dict(through_torch_save(optimizer.state_dict(), weights_only=True))
    train(params, optimizer, range(stop, 14))
    train(others, again, range(stop, 14))
    assert torch.equal(flat(params), flat(others))
    assert not any(p is q for p, q in zip(params, others))


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("stop", [2 * H, 2 * H + 1])
@pytest.mark.parametrize("way", [*COPIES, "torch's", "as before", "state_dict"])
def test_copies_go_on_bit_by_bit(pool, way, stop, make):
    pool.run(2, goes_on, way, stop, make)


def open_exchange(group):
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.SGD(params, lr=0.1), gmc(group, lr=0.7), H, overlap=True
    )
    saved = optimizer.state_dict()
    for step in range(H):
        set_gradients(params, dist.get_rank(group), step)
        optimizer.step()
    for use in (
        optimizer.state_dict, lambda: optimizer.load_state_dict(saved), optimizer.average_memory_,
        lambda: copy.deepcopy(optimizer), lambda: pickle.dumps(optimizer),
        lambda: torch.save(optimizer, io.BytesIO()), lambda: optimizer.add_param_group({}),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"call optimizer.synchronize\(\) on all workers"):
            use()
    optimizer.synchronize()
    copy.deepcopy(optimizer)
    assert same_on_all_ranks(group, params)


def test_an_open_exchange_is_not_copied(pool):
    pool.run(2, open_exchange)


def fresh(group):
    """torch makes a step of an optimizer whose state is empty."""
    params = parameters()
    optimizer = gmc_cuda.LocalUpdates(torch.optim.AdamW(params, lr=0.01), gmc(group, lr=0.7), H)
    if dist.get_rank(group) == 0:
        get_optimizer_state_dict(torch.nn.ParameterList(params), optimizer)
    for step in range(H):
        set_gradients(params, dist.get_rank(group), step)
        optimizer.step()
    optimizer.synchronize()
    assert same_on_all_ranks(group, params)


def test_a_fresh_state_is_read_on_one_rank(pool):
    pool.run(2, fresh)


def test_state_is_the_inner_optimizers():
    params = parameters()
    inner = torch.optim.AdamW(params, lr=0.01)
    optimizer = gmc_cuda.LocalUpdates(inner)
    assert optimizer.state
    assert len(optimizer.state) == 0
    assert params[0] not in optimizer.state
    assert optimizer.state.get(params[0]) is None
    set_gradients(params, 0, 0)
    optimizer.step()
    assert optimizer.state[params[0]] is inner.state[params[0]]
    optimizer.state.pop(params[0])
    assert params[0] not in inner.state
    optimizer.state.clear()
    assert not inner.state
    optimizer.state = {params[1]: {"mine": 1}}
    assert inner.state == {params[1]: {"mine": 1}} == dict(optimizer.state)
    optimizer.state = optimizer.state
    assert type(inner.state) is dict
    optimizer.param_groups = [{**inner.param_groups[0], "lr": 0.5}]
    assert inner.param_groups[0]["lr"] == 0.5


def test_methods_of_the_inner_optimizer():
    class Switched(torch.optim.SGD):
        def train(self):
            return "training"

    assert gmc_cuda.LocalUpdates(Switched(parameters(), lr=0.1)).train() == "training"


def inside_ddp(group):
    model = torch.nn.Linear(4, 4)
    ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    optimizer = plain(model.parameters(), process_group=group)
    for _ in range(H):
        ddp(torch.ones(2, 4)).sum().backward()
        if optimizer._since < H - 1:
            optimizer.step()
    with pytest.raises(RuntimeError, match="gmc_cuda.local_gradients"):
        optimizer.step()


def test_ddp_around_the_model_is_refused(pool):
    pool.run(2, inside_ddp)
