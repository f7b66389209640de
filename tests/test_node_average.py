"""NodeAverage on nodes of gloo workers: the mass equation of a flat run, and what users change."""

import copy
import functools
import io
import pickle

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
from gmc_cuda import ops
from gmc_cuda._engine import budget
from gmc_cuda.integrations import require_own, settle
from support import meshes
from support.problems import flat, mean, parameters, same_on_all_ranks, set_gradients

SHAPES = {"2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4)}


def gmc(**options):
    return functools.partial(gmc_cuda.GMC, **{"lr": 0.1, **options})


def mesh_of(shape):
    return meshes.mesh_of(SHAPES[shape])


def whole(optimizer, name, params=None):
    """What the node holds of a state vector, float64, in the order of the parameters."""
    parts = []
    for p in params or optimizer._params:
        own, begin = optimizer._parts[p]
        vector = torch.zeros(p.numel())
        value = optimizer.inner.state.get(own, {}).get(name)
        if value is not None:
            vector[begin : begin + own.numel()] = value
        parts.append(vector.double())
    total = torch.cat(parts)
    dist.all_reduce(total, group=optimizer._inside.group)
    return total


def average(optimizer, name, params=None):
    """The mean over the nodes."""
    return mean(optimizer._across.group, whole(optimizer, name, params))


def unsent(optimizer, params=None):
    """ubar + r: the memories' mean, and what the nodes' workers own for all."""
    nodes = dist.get_world_size(optimizer._across.group)
    owned = average(optimizer, "owner_memory", params)
    return average(optimizer, "memory", params) + nodes * owned


def step_keeps_mass(group, optimizer, params, gradient, decay=0.9):
    """ubar + a_t = ubar + gbar + beta * a_{t-1}, w moves by lr * a_t, over the trained ones."""
    before = unsent(optimizer, params) + gradient
    before += decay * whole(optimizer, "momentum_buffer", params)
    w, lr = flat(params), optimizer.param_groups[0]["lr"]
    optimizer.step()
    a = whole(optimizer, "momentum_buffer", params)
    after = unsent(optimizer, params) + a
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(params), w - lr * a, rtol=1e-6, atol=1e-6)
    assert same_on_all_ranks(group, params)


def mass(group, shape, density, nan_at, exchange="all_gather"):
    rank, mesh = dist.get_rank(), mesh_of(shape)
    params = parameters()
    if rank > 0:
        with torch.no_grad():
            for p in params:
                p.zero_()  # what rank 0 has counts
    make = gmc(density=density, exchange=exchange)
    optimizer = gmc_cuda.NodeAverage(params, make, mesh)
    assert torch.equal(flat(params), flat(parameters()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for step in range(8):
        optimizer.zero_grad()
        set_gradients(params, rank, step)
        gradient = mean(group, flat([p.grad for p in params]))
        if step == nan_at:
            if rank == 3:
                params[-1].grad[0, 0] = torch.nan
            w = flat(params)
            optimizer.step()
            assert torch.equal(flat(params), w)
            assert optimizer.last_step_skipped()
            assert not whole(optimizer, "momentum_buffer").any()
        else:
            step_keeps_mass(group, optimizer, params, gradient)
        schedule.step()
    return optimizer.stats()["bytes_per_step"]


@pytest.mark.parametrize("nan_at", [None, 4])
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_mass_equation_and_bytes_across(pool, shape, density, nan_at):
    sent = pool.run(4, mass, shape, density, nan_at)
    numel = sum(p.numel() for p in parameters())
    k = budget.entries_at(0.05, numel)
    if density == 0.05 and shape == "2x2":  # two workers send what a flat one would, and a header
        assert sent[0] + sent[1] <= ops.payload_nbytes(numel, k, torch.bfloat16) + 96


def like_gmc(group, make, options):
    """With one worker in a node it is GMC bit for bit; the density is the same for each bucket."""
    rank = dist.get_rank()
    params, twins = parameters(), parameters()
    optimizer = gmc_cuda.NodeAverage(
        [{"params": params[:3], "lr": 0.05}, {"params": params[3:]}],
        functools.partial(make, **options), mesh_of("4x1"),
    )  # fmt: skip
    twin = make(
        [{"params": twins[:3], "lr": 0.05}, {"params": twins[3:]}], process_group=group, **options
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, twin)]
    for step in range(6):
        for each, ps in ((optimizer, params), (twin, twins)):
            each.zero_grad()
            set_gradients(ps, rank, step)
            each.step()
        for schedule in schedules:
            schedule.step()
        assert torch.equal(flat(params), flat(twins))
        for group_of, twin_group in zip(optimizer.param_groups, twin.param_groups):
            own = {"params": 0, "node_average": None}
            assert {**group_of, "params": 0} == twin_group | own
        for p, q in zip(params, twins):
            assert torch.equal(
                flat([optimizer.state[p]["memory"]]), flat([twin.state[q]["memory"]])
            )


@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {"lr": 0.1, "density": 0.05}),
        (gmc_cuda.GMC, {"lr": 0.1, "density": 1.0, "nesterov": True}),
        (gmc_cuda.GMC, {"lr": 0.1, "density": 0.05, "momentum_form": "iterate"}),
        (gmc_cuda.DGC, {"lr": 0.1, "density": 0.05, "weight_decay": 0.1}),
    ],
)
def test_one_worker_a_node_is_gmc(pool, make, options):
    pool.run(4, like_gmc, make, options)


def like_sgd(group, change, shape):
    """At density 1 it is SGD on the averaged gradients, whatever is changed between steps."""
    rank, mesh = dist.get_rank(), mesh_of(shape)
    params = parameters()
    optimizer = gmc_cuda.NodeAverage(
        [{"params": params[:4], "lr": 0.05}, {"params": params[4:]}], gmc(density=1.0), mesh
    )
    twins = parameters()
    twin = torch.optim.SGD(
        [{"params": twins[:4], "lr": 0.05}, {"params": twins[4:]}], lr=0.1, momentum=0.9
    )
    for step in range(8):
        for each in (optimizer, twin):
            CHANGES[change](each, step)
            flat_params = [p for g in each.param_groups for p in g["params"]]
            trained = [p for p in flat_params if p.requires_grad]
            set_gradients(trained, rank, step)
            if each is twin:
                for p in trained:
                    p.grad = mean(group, p.grad)
            each.step()
            each.zero_grad()
        both = [[p for g in each.param_groups for p in g["params"]] for each in (optimizer, twin)]
        torch.testing.assert_close(flat(both[0]), flat(both[1]), rtol=1e-5, atol=1e-6)
        assert same_on_all_ranks(group, both[0])


def _freeze(each, step):
    first = each.param_groups[0]["params"]
    if step in (2, 5):
        first[1].requires_grad_(step == 5)
        first[2].requires_grad_(step == 5)


def _replace(each, step):
    if step == 3:
        torch.manual_seed(1)
        each.param_groups[0]["params"][2] = Parameter(torch.randn(9, 9))


def _remove_and_bring_back(each, step):
    if step == 2:
        each.kept = each.param_groups[0]["params"].pop(0)
    if step == 5:
        each.param_groups[1]["params"].append(each.kept)


def _reorder(each, step):
    if step == 3:
        each.param_groups.reverse()
        each.param_groups[1]["params"].reverse()


def _merge(each, step):
    if step == 3:
        each.param_groups[0]["params"].extend(each.param_groups.pop()["params"])


def _pop(each, step):
    if step == 3:
        for p in each.param_groups.pop()["params"]:
            each.state.pop(p, None)


def _append(each, step):
    if step == 3:
        each.param_groups[1]["params"].append(Parameter(torch.ones(3, 3)))


def _add(each, step):
    if step == 3:
        torch.manual_seed(2)
        added = {"params": [Parameter(torch.randn(6, 5)), Parameter(torch.ones(2))], "lr": 0.3}
        each.add_param_group(added)


def _clear(each, step):
    if step == 3:
        each.state.clear()


def _new_state(each, step):
    if step == 3:
        each.state = type(each.state)(dict)


def _write(each, step):
    if step == 3:
        for p in each.param_groups[0]["params"]:
            with torch.no_grad():
                p.mul_(0.5)  # a clipped or loaded weight counts


def _channels_last(each, step):
    if step == 3:
        p = each.param_groups[0]["params"][3]
        p.data = p.data.t_() if p.ndim == 2 else p.data.transpose(0, 1).contiguous().transpose(0, 1)


def _all_frozen(each, step):
    if step in (2, 4):
        for group in each.param_groups:
            for p in group["params"]:
                p.requires_grad_(step == 4)


CHANGES = {
    "nothing": lambda each, step: None,
    "frozen and unfrozen": _freeze,
    "all frozen and unfrozen": _all_frozen,
    "replaced": _replace,
    "removed and brought back": _remove_and_bring_back,
    "reordered": _reorder,
    "merged": _merge,
    "popped": _pop,
    "appended": _append,
    "added": _add,
    "state cleared": _clear,
    "state replaced": _new_state,
    "written to": _write,
    "other strides": _channels_last,
}


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_users_change_is_followed(pool, change, shape):
    pool.run(4, like_sgd, change, shape)


@pytest.mark.parametrize("nan_at", [None, 4])
def test_mass_equation_with_two_sided_compression(pool, nan_at):
    pool.run(4, mass, "2x2", 0.05, nan_at, "reduce_scatter")


def frozen(group, exchange):
    """Nothing unsent is lost while a layer is frozen; it is sent afterwards."""
    rank, mesh = dist.get_rank(), mesh_of("2x2")
    params = parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05, exchange=exchange), mesh)
    waiting = None
    for step in range(9):
        if step == 3:
            waiting = unsent(optimizer, params[1:3])
            assert waiting.any()
            momentum = whole(optimizer, "momentum_buffer", params[1:3])
            before = flat(params[1:3])
        if step in (3, 6):
            for p in params[1:3]:
                p.requires_grad_(step == 6)
        trained = [p for p in params if p.requires_grad]
        optimizer.zero_grad()
        set_gradients(trained, rank, step)
        gradient = mean(group, flat([p.grad for p in trained]))
        step_keeps_mass(group, optimizer, trained, gradient)
        if 3 <= step < 6:
            torch.testing.assert_close(unsent(optimizer, params[1:3]), waiting)
            assert torch.equal(whole(optimizer, "momentum_buffer", params[1:3]), momentum)
            assert torch.equal(flat(params[1:3]), before)
    assert not torch.allclose(unsent(optimizer, params[1:3]), waiting)


@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter"])
def test_what_a_frozen_layer_has_not_sent_waits_for_it(pool, exchange):
    pool.run(4, frozen, exchange)


def odd(group):
    """Frozen parameters of any kind are left alone, and several dtypes are trained."""
    rank, mesh = dist.get_rank(), mesh_of("2x2")
    kinds = [torch.arange(4), torch.ones(4, dtype=torch.complex64), torch.ones(3, device="meta"),
             torch.ones(1).expand(4), torch.eye(3).to_sparse()]  # fmt: skip
    strange = [Parameter(t, requires_grad=False) for t in kinds]
    params = parameters()[:3] + [p.detach().bfloat16().requires_grad_() for p in parameters()[3:]]
    optimizer = gmc_cuda.NodeAverage([*strange, *params], gmc(density=0.1), mesh)
    start = flat(params)
    for step in range(4):
        set_gradients(params, rank, step)
        optimizer.step()
    assert not torch.equal(start, flat(params))
    for p in params:
        assert same_on_all_ranks(group, [p])
    assert torch.equal(strange[0].detach(), torch.arange(4))
    assert not optimizer.state.get(strange[0])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_frozen_parameters_of_any_kind_and_several_dtypes(pool):
    pool.run(4, odd)


def few(group):
    """Workers without any part of a parameter."""
    rank, mesh = dist.get_rank(), mesh_of("1x4")
    params = [Parameter(torch.zeros(3))]
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=1.0, momentum=0.0), mesh)
    assert optimizer.state
    for _ in range(2):
        params[0].grad = torch.full((3,), float(rank))
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((3,), -0.3))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"][0]["memory"].shape == (int(rank < 3),)


def test_more_workers_than_elements(pool):
    pool.run(4, few)


def without_a_part(group, case, exchange, shape):
    """Workers whose parts are all empty do as the others do: skip, raise, or leave the step."""
    rank, params = dist.get_rank(), [Parameter(torch.ones(1)), Parameter(torch.ones(1).bfloat16())]
    outer = gmc(momentum=0.0, nonfinite="raise" if case == "raised" else "skip", exchange=exchange)
    optimizer = gmc_cuda.NodeAverage(params, outer, mesh_of(shape))
    scaler = gmc_cuda.GradScaler("cpu", init_scale=16.0)
    for step in range(4):
        bad = step == 1 and rank == 0
        for p in params:
            p.grad = torch.full_like(p, torch.inf if bad and case != "left" else 1.0)
        if case == "scaled":
            scaler.scale(torch.zeros(()))
            for p in params:
                p.grad *= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        elif step == 1:
            with pytest.MonkeyPatch.context() as patch:
                if bad and case == "left":
                    for name in ("compress_", "accumulate_"):
                        patch.setattr(ops, name, once(getattr(ops, name)))
                wrong = {"raised": FloatingPointError, "left": RuntimeError}[case]
                with pytest.raises(wrong):
                    optimizer.step()
        else:
            optimizer.step()
        assert optimizer.last_step_skipped() is None or bool(optimizer.last_step_skipped()) == (
            step == 1
        )
        assert same_on_all_ranks(group, params)
    assert scaler.get_scale() == (8.0 if case == "scaled" else 16.0)
    stats = optimizer.stats()
    return stats["steps"], stats["skipped_steps"], params[0].item()


def once(function):
    """The function, which raises when it is called again."""
    calls = iter([function])
    return lambda *args, **options: next(calls, interrupted)(*args, **options)


def interrupted(*args, **options):
    raise RuntimeError("no memory")


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("case", ["scaled", "raised", "left"])
def test_workers_without_a_part_skip_and_raise_with_the_others(pool, case, exchange, shape):
    first, *others = pool.run(4, without_a_part, case, exchange, shape)
    assert others == 3 * [first]
    assert first[:2] == (4, 1)


def late_error(group, ranks, shape):
    """An error that comes when a step was made: the parts are gathered all the same."""
    rank, params = dist.get_rank(), parameters()
    outer = gmc(momentum=0.0, density=0.05)
    optimizer = gmc_cuda.NodeAverage(params, outer, mesh_of(shape))
    twins = parameters()
    twin = gmc_cuda.NodeAverage(twins, outer, mesh_of(shape))
    for step in range(4):
        with pytest.MonkeyPatch.context() as patch:
            if step == 1 and rank in ranks:
                patch.setattr(optimizer.engine.round.skips, "look", interrupted)
            for each, own in ((optimizer, params), (twin, twins)):
                set_gradients(own, rank, step)
                if step == 1 and rank in ranks and each is optimizer:
                    with pytest.raises(RuntimeError, match="no memory"):
                        each.step()
                    assert all(p.grad is None for p in own), "they are in memory"
                else:
                    each.step()
        assert torch.equal(flat(params), flat(twins))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [[0], [0, 1, 2, 3]])
def test_an_error_that_comes_late_loses_no_step(pool, ranks, shape):
    pool.run(4, late_error, ranks, shape)


# ---------------------------------------------------------------------------- errors on one rank


def bad_argument(group, case):
    rank, mesh, params = dist.get_rank(), mesh_of("2x2"), parameters()
    make = gmc(density=0.05)
    mine = rank == 2
    if case == "parameter" and mine:
        params[1] = Parameter(torch.ones(5, dtype=torch.float64))
    if case == "strides" and mine:
        params[1] = Parameter(torch.ones(5, 2)[:, 0])
    if case == "no parameters" and mine:
        params = []
    if case == "option" and mine:
        make = gmc(density=7.0)
    if case == "keyword" and mine:
        make = gmc(densty=0.1)
    if case == "other optimizer" and mine:
        make = lambda params, process_group: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    if case == "raises" and mine:
        make = lambda params, process_group: 1 / 0  # noqa: E731
    if case == "shape" and mine:
        params[1] = Parameter(torch.ones(6))
    if case == "frozen" and mine:
        params[1].requires_grad_(False)
    with pytest.raises(Exception) as raised:
        gmc_cuda.NodeAverage(params, make, mesh)
    optimizer = gmc_cuda.NodeAverage(parameters(), gmc(density=0.05), mesh)  # all is still in step
    optimizer.step()
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    "case,own,reason",
    [
        ("parameter", "TypeError", "float64"),
        ("strides", "ValueError", "without gaps"),
        ("no parameters", "ValueError", "empty parameter list"),
        ("option", "ValueError", "density"),
        ("keyword", "TypeError", "densty"),
        ("other optimizer", "TypeError", "it made a SGD"),
        ("raises", "ZeroDivisionError", "division"),
        ("shape", "ValueError", "shape of parameter 1"),
        ("frozen", "ValueError", "requires_grad of parameter 1"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(pool, case, own, reason):
    told = pool.run(4, bad_argument, case)
    assert told[2].startswith(own)
    for rank, text in enumerate(told):
        assert reason in text
        assert rank == 2 or case in ("shape", "frozen") or "rank 2" in text or "rank 1" in text


def added_on_one(group):
    rank, mesh, params = dist.get_rank(), mesh_of("2x2"), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=1.0), mesh)
    new = Parameter(torch.full((4,), float(rank)), requires_grad=True)
    for bad in ({"params": [Parameter(torch.ones(2, dtype=torch.int8), False)], "lr": -1.0},
                {"params": [params[0]]}, {"params": [new], "density": 0.5}):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            optimizer.add_param_group(bad if rank == 1 else {"params": [new]})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [new]})
    assert torch.equal(new.detach(), torch.zeros(4))
    set_gradients([*params, new], rank, 0)
    optimizer.step()
    assert same_on_all_ranks(group, [*params, new])


def test_an_error_in_add_param_group_changes_nothing(pool):
    pool.run(4, added_on_one)


def refused_step(group):
    """Nothing is lost by a refused option, gradient or layer, and the next step works."""
    rank, mesh, params = dist.get_rank(), mesh_of("2x2"), parameters()
    twins = parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    twin = gmc_cuda.NodeAverage(twins, gmc(density=0.05), mesh)
    for step in range(3):
        for ps in (params, twins):
            set_gradients(ps, rank, step)
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr of param group 0"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        good = params[0].grad
        params[0].grad = good.to_sparse()
        with pytest.raises(TypeError, match="gradient of parameter 0 of group 0"):
            optimizer.step()
        params[0].grad = good
        optimizer.param_groups[0]["params"].append(Parameter(torch.ones(2, dtype=torch.float64)))
        with pytest.raises(TypeError, match="parameter 6 of group 0: got torch.float64"):
            optimizer.step()
        optimizer.param_groups[0]["params"].pop()
        optimizer.step()
        twin.step()
        assert torch.equal(flat(params), flat(twins))


def test_a_refused_step_loses_nothing(pool):
    pool.run(4, refused_step)


def raised_step(group, shape):
    """A step that fails after it took the gradients in leaves them in memory, and only there."""
    rank, mesh, params = dist.get_rank(), mesh_of(shape), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05, nonfinite="raise"), mesh)
    for step in range(4):
        set_gradients(params, rank, step)
        if step == 2:
            if rank == 3:
                params[0].grad[0, 0] = torch.nan
            gradient = mean(group, flat([p.grad for p in params])).nan_to_num(0.0)
            expected = average(optimizer, "memory") + gradient
            expected += 0.9 * whole(optimizer, "momentum_buffer")
            w = flat(params)
            with pytest.raises(FloatingPointError, match="non-finite gradient"):
                optimizer.step()
            assert torch.equal(flat(params), w)
            assert all(p.grad is None for p in params)
            left = average(optimizer, "memory")  # but for the element itself
            torch.testing.assert_close(left[1:], expected[1:], rtol=1e-5, atol=1e-6)
        else:
            step_keeps_mass(group, optimizer, params, mean(group, flat([p.grad for p in params])))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_step_keeps_the_gradients_once(pool, shape):
    pool.run(4, raised_step, shape)


# ------------------------------------------------------------------------ saving and copying


def trained(params, optimizer, rank, steps):
    for step in steps:
        set_gradients([p for p in params if p.requires_grad], rank, step)
        optimizer.step()


def resumed(group, way, shape, make):
    rank, mesh = dist.get_rank(), mesh_of(shape)
    make = functools.partial(make, lr=0.1, density=0.05)
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = gmc_cuda.NodeAverage(groups, make, mesh)
    trained(params, optimizer, rank, range(3))
    params[2].requires_grad_(False)
    trained(params, optimizer, rank, range(3, 5))
    model = torch.nn.ParameterList(params)
    if way in ("deepcopy", "pickle", "torch.save"):
        again, others = COPIES[way]((optimizer, params))
        if way != "deepcopy":
            with pytest.raises(RuntimeError, match="set optimizer.process_group"):
                again.step()
            again.process_group = mesh
    else:
        others = parameters()
        again = gmc_cuda.NodeAverage(
            [{"params": others[:2]}, {"params": others[2:], "lr": 0.2}], make, mesh
        )
        other_model = torch.nn.ParameterList(others)
        if way == "state_dict":
            others[2].requires_grad_(False)
            saved = COPIES["torch.save"](optimizer.state_dict(), weights_only=True)
            again.load_state_dict(saved)
            again.load_state_dict(again.state_dict())
        elif way == "other layers frozen":  # while it is loaded
            again.load_state_dict(COPIES["torch.save"](optimizer.state_dict()))
            others[2].requires_grad_(False)
        elif way == "torch's":
            others[2].requires_grad_(False)
            set_optimizer_state_dict(
                other_model, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            )
        with torch.no_grad():
            for p, weight in zip(others, params, strict=True):
                p.copy_(weight)
    unfreezes = way != "torch's"  # which drops what a frozen parameter has
    for step in range(5, 9):
        if step == 7 and unfreezes:
            params[2].requires_grad_(True)
            others[2].requires_grad_(True)
        trained(params, optimizer, rank, [step])
        trained(others, again, rank, [step])
        assert torch.equal(flat(params), flat(others)), step
    assert not any(p is q for p, q in zip(params, others))


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


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("shape", ["2x2", "1x4"])
@pytest.mark.parametrize(
    "way", ["state_dict", "other layers frozen", "torch's", "deepcopy", "pickle", "torch.save"]
)
def test_save_and_copy_go_on_bit_by_bit(pool, way, shape, make):
    pool.run(4, resumed, way, shape, make)


def fresh(group):
    """torch steps a fresh optimizer whose state is empty, on one rank alone."""
    rank, mesh, params = dist.get_rank(), mesh_of("2x2"), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    if rank == 0:
        get_optimizer_state_dict(torch.nn.ParameterList(params), optimizer)
    trained(params, optimizer, rank, range(3))
    assert same_on_all_ranks(group, params)


def test_a_fresh_state_is_read_on_one_rank(pool):
    pool.run(4, fresh)


def foreign(group):
    rank, mesh, params = dist.get_rank(), mesh_of("2x2"), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    trained(params, optimizer, rank, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    plain = gmc_cuda.GMC(parameters(), 0.1, process_group=group)
    with pytest.raises(ValueError, match="got the state of GMC, must be of NodeAverage"):
        optimizer.load_state_dict(plain.state_dict())
    everyone = [None] * 4
    dist.all_gather_object(everyone, before, group=group)
    other = everyone[rank ^ 1]
    with pytest.raises(ValueError, match=r"got that of worker \d of 2 in its node"):
        optimizer.load_state_dict(other)
    small = gmc_cuda.NodeAverage(parameters()[:3], gmc(density=0.05), mesh)
    with pytest.raises(ValueError, match="parameters in group 0"):
        optimizer.load_state_dict(small.state_dict())
    after = optimizer.state_dict()
    assert str(before) == str(after)


def test_a_foreign_state_is_refused(pool):
    pool.run(4, foreign)


# --------------------------------------------------------------------------------- loss scaling


def owners(optimizer):
    """Which worker of the node owns each element."""
    parts = []
    for p in optimizer._params:
        own, begin = optimizer._parts[p]
        parts.append(torch.zeros(p.numel()))
        parts[-1][begin : begin + own.numel()] = float(optimizer._place[0])
    total = torch.cat(parts)
    dist.all_reduce(total, group=optimizer._inside.group)
    return total


def scaled(group, unscale, shape):
    rank, mesh, params, twins = dist.get_rank(), mesh_of(shape), parameters(), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    twin = gmc_cuda.NodeAverage(twins, gmc(density=0.05), mesh)
    scaler = gmc_cuda.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(4):
        set_gradients(params, rank, step)
        set_gradients(twins, rank, step)
        for p in params:
            p.grad.mul_(scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
            assert torch.equal(flat([p.grad for p in params]), flat([p.grad for p in twins]))
            for ps in (params, twins):
                torch.nn.utils.clip_grad_norm_(ps, 0.5)
        scaler.step(optimizer)
        scaler.update()
        twin.step()
        assert torch.equal(flat(params), flat(twins))
    w, scale = flat(params), scaler.get_scale()
    expected = average(optimizer, "memory") + 0.9 * whole(optimizer, "momentum_buffer")
    set_gradients(params, rank, 9)
    # The gradient of rank 1 counts as zero, and so does its node's of what it owns.
    per_node = optimizer.workers_in_node
    kept = torch.full_like(expected, float(rank != 1))
    if rank // per_node == 1 // per_node:
        kept[owners(optimizer) == 1 % per_node] = 0.0
    expected += mean(group, kept * flat([p.grad for p in params]))
    for p in params:
        p.grad.mul_(scale)
    if rank == 1:
        params[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(params), w)
    assert scaler.get_scale() == scale / 2
    torch.testing.assert_close(average(optimizer, "memory"), expected, rtol=1e-5, atol=1e-6)
    set_gradients(params, rank, 10)
    scaler.step(optimizer)
    assert same_on_all_ranks(group, params)
    assert not torch.equal(flat(params), w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(pool, unscale, shape):
    pool.run(4, scaled, unscale, shape)


def plain_scaler(group, shape):
    rank, params = dist.get_rank(), parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh_of(shape))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    set_gradients(params, rank, 0)
    with pytest.raises(RuntimeError, match="use gmc_cuda.GradScaler in its place"):
        scaler.step(optimizer)
    optimizer.step()  # nothing of the scaler is left
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_grad_scaler_is_refused(pool, shape):
    pool.run(4, plain_scaler, shape)


def inside_ddp(group, over):
    mesh, model = mesh_of("2x2"), torch.nn.Linear(4, 4)
    ranks = {"all": group, "across": mesh.get_group(0), "inside": mesh.get_group(1)}[over]
    ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=ranks)
    optimizer = gmc_cuda.NodeAverage(model.parameters(), gmc(), mesh)
    ddp(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="gmc_cuda.local_gradients"):
        optimizer.step()


@pytest.mark.parametrize("over", ["all", "across", "inside"])
def test_ddp_around_the_model_is_refused(pool, over):
    pool.run(4, inside_ddp, over)


def test_wrong_uses():
    with pytest.raises(ValueError, match="mesh: got None, must be a 2-D device mesh"):
        gmc_cuda.NodeAverage(parameters(), gmc(), None)


def changed_on_one(group, change, shape):
    """Layers that one worker alone changes: an error on every worker, and the next step works."""
    rank, mesh = dist.get_rank(), mesh_of(shape)
    params = parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    set_gradients(params, rank, 0)
    optimizer.step()
    set_gradients(params, rank, 1)
    came = average(optimizer, "memory") + mean(group, flat([p.grad for p in params]).double())
    came += 0.9 * whole(optimizer, "momentum_buffer")
    before, grads = flat(params), [p.grad for p in params]
    kept = params[2]
    if rank == 1:
        if change == "frozen":
            kept.requires_grad_(False)
        else:
            optimizer.param_groups[0]["params"][2] = Parameter(kept.detach().clone())
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        words = str(caught.value)
        if change == "frozen":
            assert "requires_grad of parameter 2, group 0: True on rank 0, False on rank 1" in words
        else:
            assert "replaced by others of their kind" in words
    assert torch.equal(flat(params), before)
    if rank < SHAPES[shape][1]:  # in the other node they were compressed, and are in memory
        assert all(p.grad is grad for p, grad in zip(params, grads))
    if rank == 1:
        kept.requires_grad_(True)
        optimizer.param_groups[0]["params"][2] = kept
    optimizer.step()
    a = whole(optimizer, "momentum_buffer")
    torch.testing.assert_close(average(optimizer, "memory") + a, came, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(params).double(), before - 0.1 * a, rtol=1e-5, atol=1e-6)
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
@pytest.mark.parametrize("change", ["frozen", "replaced"])
def test_layers_changed_on_one_worker_are_an_error_on_all(pool, change, shape):
    pool.run(4, changed_on_one, change, shape)


def changed_differently(group, shape):
    """All workers change something, but not the same."""
    rank, mesh = dist.get_rank(), mesh_of(shape)
    params = parameters()
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    set_gradients(params, rank, 0)
    params[rank].requires_grad_(False)
    with pytest.raises(ValueError, match="they differ in"):
        optimizer.step()
    params[rank].requires_grad_(True)
    params[2].requires_grad_(False)
    optimizer.step()
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
def test_layers_changed_differently_are_an_error_on_all(pool, shape):
    pool.run(4, changed_differently, shape)


def flattened(group, shape):
    """torch's flattened state, each worker its own."""
    rank, mesh = dist.get_rank(), mesh_of(shape)
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    params, others = parameters(), parameters()
    params[2].requires_grad_(False)
    others[2].requires_grad_(False)
    optimizer = gmc_cuda.NodeAverage(params, gmc(density=0.05), mesh)
    trained([p for p in params if p.requires_grad], optimizer, rank, range(4))
    model, other = torch.nn.ParameterList(params), torch.nn.ParameterList(others)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    again = gmc_cuda.NodeAverage(others, gmc(lr=9.0, density=0.5), mesh)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, again, saved, options=how)
    for each, own in ((optimizer, params), (again, others)):
        trained([p for p in own if p.requires_grad], each, rank, range(4, 8))
    assert torch.equal(flat(params), flat(others))


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
def test_a_flattened_state_goes_on_bit_by_bit(pool, shape):
    pool.run(4, flattened, shape)


def in_a_framework(group):
    """Frameworks save rank 0's state alone, of which a NodeAverage has a part on each worker."""
    line = "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)"
    parted = gmc_cuda.NodeAverage(parameters(), gmc(), mesh_of("2x2"))
    for refused in (lambda: require_own([parted], "it", line), lambda: settle(parted)):
        with pytest.raises(ValueError, match="over 2 workers .* a framework saves"):
            refused()
    whole_state = gmc_cuda.NodeAverage(parameters(), gmc(), mesh_of("4x1"))
    require_own([whole_state], "it", line)
    set_gradients(whole_state.param_groups[0]["params"], dist.get_rank(group), 0)
    whole_state.step()
    settle(whole_state)
    memory = torch.cat([whole_state.state[p]["memory"] for p in whole_state.state])
    torch.testing.assert_close(memory, mean(group, memory), rtol=0, atol=0)


def test_frameworks_refuse_a_state_in_parts(pool):
    pool.run(4, in_a_framework)
