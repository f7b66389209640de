"""Saving and loading in the middle of a run."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

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
from support.workers import Workers


def resume(group, make, dtype, options):
    """Save at step 7, load into a new optimizer, continue: the same bits as without stopping."""
    rank = dist.get_rank(group)
    params = parameters(dtype)
    optimizer = make(params, lr=0.05, density=0.05, process_group=group, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for step in range(14):
        if step == 7:
            file = io.BytesIO()
            torch.save([params, optimizer.state_dict(), scheduler.state_dict()], file)
        set_gradients(params, rank, step)
        optimizer.step()
        scheduler.step()

    file.seek(0)
    saved, state, schedule = torch.load(file, weights_only=False)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved]
    optimizer2 = make(resumed, lr=1.0, process_group=group, **options)
    scheduler2 = torch.optim.lr_scheduler.StepLR(optimizer2, 5, gamma=0.5)
    optimizer2.load_state_dict(state)
    scheduler2.load_state_dict(schedule)
    for step in range(7, 14):
        set_gradients(resumed, rank, step)
        optimizer2.step()
        scheduler2.step()
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)
        assert optimizer2.state[b]["memory"].dtype == torch.float32
        assert torch.equal(optimizer.state[a]["memory"], optimizer2.state[b]["memory"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {}),
        (gmc_cuda.GMC, {"momentum_form": "iterate"}),
        (gmc_cuda.DGC, {}),
    ],
)
def test_resuming_gives_the_same_bits(pool, size, dtype, make, options):
    pool.run(size, resume, make, dtype, options)


def test_state_holds_float32_memory_before_the_first_step():
    optimizer = gmc_cuda.GMC([torch.nn.Parameter(torch.ones(4, 5).bfloat16())], lr=0.1)
    (param,) = optimizer.param_groups[0]["params"]
    memory = optimizer.state[param]["memory"]
    assert memory.dtype == torch.float32
    assert memory.shape == param.shape
    assert optimizer.state_dict()["state"][0]["memory"].shape == param.shape


def test_layouts_need_not_match():
    """What was saved from a channels_last parameter loads into a contiguous one."""
    values = torch.randn(4, 3, 5, 5)
    params = [torch.nn.Parameter(values.to(memory_format=torch.channels_last)),
              torch.nn.Parameter(values.clone())]  # fmt: skip
    optimizers = [gmc_cuda.GMC([p], lr=0.1, density=0.1) for p in params]
    params[0].grad = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    states = [optimizers[i].state_dict()["state"][0] for i in (0, 1)]
    for name in ("memory", "momentum_buffer"):
        assert states[0][name].any()
        assert torch.equal(states[0][name], states[1][name])


# ---------------------------------------------------------------- what users and frameworks do


def trained(make=gmc_cuda.GMC, steps=3, group=None, dtype=torch.float32, **options):
    """Parameters in two groups and their optimizer, after a few steps."""
    params = parameters(dtype)
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.1}]
    options = {"lr": 0.1, "density": 0.1, "process_group": group, **options}
    optimizer = make(groups, **options)
    go_on(optimizer, range(steps), 0 if group is None else dist.get_rank(group))
    return params, optimizer


def go_on(optimizer, steps, rank=0):
    params = params_of(optimizer)
    for step in steps:
        set_gradients(params, rank, step)
        optimizer.step()


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same_run(first, second, rank=0):
    """Both have the same state, and go on with the same bits."""
    assert_same_state(first, second)
    for optimizer in (first, second):
        go_on(optimizer, range(50, 53), rank)
    assert_same_state(first, second)
    for a, b in zip(params_of(first), params_of(second), strict=True):
        assert torch.equal(a, b)


def assert_same_state(first, second):
    states = [optimizer.state_dict()["state"] for optimizer in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert states[0]
    for i, tensors in states[0].items():
        assert tensors.keys() == states[1][i].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[1][i][name]), (i, name)


METHODS = [
    (gmc_cuda.GMC, {}),
    (gmc_cuda.GMC, {"momentum_form": "iterate"}),
    (gmc_cuda.GMC, {"density": 1.0}),
    (gmc_cuda.DGC, {}),
    (gmc_cuda.DGC, {"density": 1.0}),
]
methods = pytest.mark.parametrize("make,options", METHODS)


@methods
def test_loading_its_own_state_changes_nothing(make, options):
    """Accelerate's prepare and set_optimizer_state_dict do this."""
    _, optimizer = trained(make, **options)
    _, twin = trained(make, **options)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_run(optimizer, twin)


@methods
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_like_the_original(make, options, way):
    _, optimizer = trained(make, **options)
    optimizer.register_step_post_hook(lambda *_: None)
    if way == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not set(params_of(twin)) & set(params_of(optimizer))
    assert twin.stats()["steps"] == optimizer.stats()["steps"] == 3
    assert_same_run(optimizer, twin)
    twin.load_state_dict(optimizer.state_dict())
    assert_same_run(optimizer, twin)


def test_a_model_and_its_optimizer_are_copied_together():
    model = torch.nn.Linear(5, 3)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, overlap=True)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    before = flat(list(model2.parameters()))
    model2(torch.ones(2, 5)).sum().backward()
    assert model2.weight.grad is None, "overlap sends the copy's gradients too"
    optimizer2.step()
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    assert not torch.equal(flat(list(model2.parameters())), before)
    assert optimizer.stats()["steps"] == 0


def copy_with_a_group(group):
    rank = dist.get_rank(group)
    _, optimizer = trained(group=group)
    assert_same_run(copy.deepcopy(optimizer), optimizer, rank)
    for again in (lambda twin: twin, copy.deepcopy):  # a copy of the copy lacks its group too
        twin = again(pickle.loads(pickle.dumps(optimizer)))
        with pytest.raises(RuntimeError, match=r"set optimizer\.process_group = group"):
            twin.step()
        twin.process_group = group
        assert_same_run(twin, optimizer, rank)


def test_copies_on_several_workers(pool):
    pool.run(2, copy_with_a_group)


@methods
def test_state_dict_is_deterministic_and_safe_to_load(make, options):
    _, optimizer = trained(make, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    _, twin = trained(make, steps=0, **options)
    twin.load_state_dict(loaded)
    assert_same_state(optimizer, twin)
    assert repr(optimizer.state_dict()) == repr(twin.state_dict())


def test_shapes_are_final_from_construction_on():
    _, fresh = trained(steps=0)
    _, optimizer = trained()
    for i, tensors in optimizer.state_dict()["state"].items():
        for name, tensor in tensors.items():
            assert fresh.state_dict()["state"][i][name].shape == tensor.shape


def test_an_option_that_came_later_keeps_its_value():
    _, optimizer = trained(momentum_form="iterate")
    state = optimizer.state_dict()
    _, twin = trained(momentum_form="iterate", steps=0)
    for group in state["param_groups"]:
        del group["momentum_form"], group["previous_lr"]
        group["lr"] = 0.7
    twin.load_state_dict(state)
    group = twin.param_groups[0]
    assert (group["lr"], group["momentum_form"], group["previous_lr"]) == (0.7, "iterate", None)
    go_on(twin, range(2))


def test_hooks_see_and_change_what_is_loaded():
    _, optimizer = trained()
    _, twin = trained(steps=0)
    calls = []

    def double(optimizer, state_dict):
        calls.append("pre")
        state = {i: {**s, "memory": 2 * s["memory"]} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    twin.register_load_state_dict_pre_hook(double)
    twin.register_load_state_dict_pre_hook(lambda *_: calls.append("second"))
    twin.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    twin.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "second", "post"]
    for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
        assert torch.equal(2 * optimizer.state[a]["memory"], twin.state[b]["memory"])
    optimizer.register_state_dict_post_hook(lambda _, s: calls.append(sorted(s["state"][0])))
    optimizer.state_dict()
    assert calls[-1] == ["memory", "momentum_buffer"]


# ------------------------------------------------------------------------- other optimizers' states


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_sgd_state_goes_on_here_and_back(make):
    """At density 1 the three runs are one."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    twins, params = parameters(), parameters()
    sgd, dense = torch.optim.SGD(twins, **options), make(params, lr=7.0, density=1.0)
    go_on(sgd, range(3))
    for param, twin in zip(params, twins, strict=True):
        param.data.copy_(twin)
    dense.load_state_dict(sgd.state_dict())
    assert dense.param_groups[0]["lr"] == 0.1
    assert dense.param_groups[0]["density"] == 1.0
    for optimizer in (sgd, dense):
        go_on(optimizer, range(3, 6))
    torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=1e-6)
    if make is gmc_cuda.DGC:
        return
    sgd2 = torch.optim.SGD(params, lr=5.0)
    sgd2.load_state_dict(dense.sgd_state_dict())
    for optimizer in (sgd, sgd2):
        go_on(optimizer, range(6, 9))
    torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=1e-6)


def test_sgd_before_its_first_step_or_without_momentum():
    _, optimizer = trained()
    params = parameters()
    sgd = torch.optim.SGD([{"params": params[:4]}, {"params": params[4:]}], lr=0.3)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["momentum"] == 0
    for state in optimizer.state_dict()["state"].values():
        assert not any(tensor.any() for tensor in state.values())


def test_memory_is_not_dropped_on_the_way_to_sgd():
    _, optimizer = trained()
    with pytest.raises(ValueError, match="not sent yet.*set density to 1.0 in every param group"):
        optimizer.sgd_state_dict()
    for group in optimizer.param_groups:
        group["density"] = 1.0
    go_on(optimizer, [7])
    optimizer.sgd_state_dict()


TWO_GROUPS = (slice(0, 4), slice(4, None))


def state_of(make, cut=TWO_GROUPS, **options):
    params = parameters()
    optimizer = make([{"params": params[part]} for part in cut], lr=0.1, **options)
    go_on(optimizer, range(1))
    return optimizer.state_dict()


def changed(change):
    def make():
        state = copy.deepcopy(state_of(gmc_cuda.GMC))
        change(state["state"], state["param_groups"])
        return state

    return make


SGD = torch.optim.SGD
WRONG_STATES = {
    "DGC's": (lambda: state_of(gmc_cuda.DGC), "got the state of DGC, must be of GMC"),
    "AdamW's": (
        lambda: state_of(torch.optim.AdamW),
        "the state of another optimizer, with .*'exp_avg'",
    ),
    "damped SGD's": (
        lambda: state_of(SGD, momentum=0.9, dampening=0.1),
        "SGD's with dampening=0.1, must be 0",
    ),
    "Nesterov SGD's": (
        lambda: state_of(SGD, momentum=0.9, nesterov=True),
        "nesterov=True, must be False",
    ),
    "one group": (
        lambda: state_of(gmc_cuda.GMC, [slice(None)]),
        "got 1 param groups, must be 2",
    ),
    "other groups": (
        lambda: state_of(gmc_cuda.GMC, [slice(0, 3), slice(3, None)]),
        "got 3 parameters in group 0, must be 4",
    ),
    "a parameter twice": (
        changed(lambda state, groups: groups[1].update(params=[0, 1])),
        "parameter 0 appears twice",
    ),
    "no memory": (
        changed(lambda state, groups: state[2].pop("memory")),
        "parameter 2 has no 'memory'",
    ),
    "another shape": (
        changed(lambda state, groups: state[2].update(memory=torch.zeros(3))),
        r"memory of parameter 2 has shape \(3,\), must be \(16, 8\)",
    ),
    "a later format": (
        changed(lambda state, groups: [g["saved_by"].update(format=9) for g in groups]),
        "got format 9, this version of gmc_cuda reads 1",
    ),
    "an option out of range": (
        changed(lambda state, groups: groups[1].update(density=7)),
        "density of param group 1: got 7, must be above 0",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_states_are_refused_and_change_nothing(case):
    make_state, words = WRONG_STATES[case]
    _, optimizer = trained()
    _, twin = trained()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(make_state())
    assert_same_run(optimizer, twin)


def test_overridden_methods_keep_torch_parameter_names():
    for name in ("step", "add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        ours = inspect.signature(getattr(gmc_cuda.GMC, name)).parameters
        theirs = inspect.signature(getattr(torch.optim.Optimizer, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs), name


# -------------------------------------------------------------------------- other ranks' memories


def load_rank_zeros(group, average):
    """What frameworks do that save the optimizer of rank 0 only."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    params, optimizer = trained(group=group)
    unsent = mean(group, memory_of(optimizer, params))
    if average:
        optimizer.average_memory_()
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved, dist.get_global_rank(group, 0), group=group)
    resumed, optimizer2 = trained(group=group, steps=0)
    for a, b in zip(params, resumed, strict=True):
        b.data.copy_(a)
    if rank == 0 or average:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer2.load_state_dict(saved[0])
    else:
        words = f"this optimizer is rank {rank} of {size}, but the state was saved by rank 0 of"
        with pytest.warns(UserWarning, match=words):
            optimizer2.load_state_dict(saved[0])
    kept = mean(group, memory_of(optimizer2, resumed))
    if not average:
        assert (kept - unsent).norm() > 0.1 * unsent.norm()
        return
    torch.testing.assert_close(kept, unsent, rtol=1e-6, atol=1e-6)
    assert torch.equal(aggregate_of(optimizer, params), aggregate_of(optimizer2, resumed))
    assert_same_run(optimizer, optimizer2, rank)
    assert not optimizer.state_dict()["param_groups"][0]["saved_by"]["averaged"]


@pytest.mark.parametrize("average", [False, True])
def test_rank_zeros_state_on_all_ranks(pool, average):
    pool.run(2, load_rank_zeros, average)


def average(group, make):
    """Invariant 10: the sum of what is unsent, the aggregate and x go on."""
    rank = dist.get_rank(group)
    params, optimizer = trained(make, group=group)
    before, aggregate = mean(group, memory_of(optimizer, params)), aggregate_of(optimizer, params)
    x = flat(params) - 0.1 * before
    optimizer.average_memory_()
    after = memory_of(optimizer, params)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(params) - 0.1 * after, x, rtol=1e-6, atol=1e-6)
    assert torch.equal(aggregate_of(optimizer, params), aggregate)
    assert torch.equal(mean(group, after), after)
    go_on(optimizer, range(3, 5), rank)
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_averaged_memory_keeps_the_run(pool, size, make):
    pool.run(size, average, make)


def average_while_frozen(group, make):
    """What a frozen parameter had not sent waits in memory, and is averaged as well."""
    rank = dist.get_rank(group)
    params, optimizer = trained(make, group=group)
    params[0].requires_grad_(False)
    go_on(optimizer, range(3, 4), rank)
    own = ["memory", "momentum_buffer"] if make is gmc_cuda.DGC else ["memory"]
    state = optimizer.state[params[0]]
    before = {name: mean(group, flat([state[name]])) for name in own}
    aggregate = state["momentum_buffer"].clone()
    optimizer.average_memory_()
    for name in own:
        after = flat([optimizer.state[params[0]][name]])
        torch.testing.assert_close(after, before[name], rtol=1e-5, atol=1e-6)
    if make is gmc_cuda.GMC:
        assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], aggregate)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_averaged_memory_of_a_frozen_parameter(pool, make):
    pool.run(2, average_while_frozen, make)


def save_and_load_distributed(group, folder):
    """Plain torch.distributed.checkpoint: keeps one memory, so it must be the average."""
    rank = dist.get_rank(group)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3))
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1, process_group=group)
    go_on(optimizer, range(3), rank)
    optimizer.average_memory_()
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder, process_group=group)

    model2 = copy.deepcopy(model)
    optimizer2 = gmc_cuda.GMC(model2.parameters(), lr=9.0, density=0.5, process_group=group)
    state = {"optimizer": get_optimizer_state_dict(model2, optimizer2)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(model2, optimizer2, state["optimizer"])
    assert optimizer2.param_groups[0]["density"] == 0.1
    assert_same_run(optimizer, optimizer2, rank)


@pytest.mark.parametrize("size", [1, 2])
def test_plain_distributed_checkpoint(pool, size, tmp_path):
    pool.run(size, save_and_load_distributed, str(tmp_path))


def make_layers():
    return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3))


def two_groups(model):
    return [{"params": list(layer.parameters())} for layer in model]


@pytest.mark.parametrize("flatten", [False, True])
@methods
def test_torchs_optimizer_state_dict_goes_on_like_the_original(make, options, flatten):
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_layers()
    optimizer = make(two_groups(model), lr=0.1, **{"density": 0.1, **options})
    go_on(optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    twin = copy.deepcopy(model)
    again = make(two_groups(twin), lr=9.0, **{**options, "density": 0.7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(twin, again, saved, options=how)
    assert again.param_groups[1]["lr"] == 0.1
    assert_same_run(optimizer, again)


def flattened_on_disk(group, folder, dtype):
    """torch.distributed.checkpoint of a flattened state, under another default dtype."""
    rank, how = dist.get_rank(group), StateDictOptions(flatten_optimizer_state_dict=True)
    default = torch.get_default_dtype()
    pairs = []
    for lr in (0.1, 9.0):
        torch.manual_seed(4)
        model = make_layers().bfloat16()
        pairs.append(
            (model, gmc_cuda.GMC(model.parameters(), lr, density=0.1, process_group=group))
        )
    (model, optimizer), (twin, again) = pairs
    go_on(optimizer, range(3), rank)
    optimizer.average_memory_()
    twin.load_state_dict(model.state_dict())
    try:
        torch.set_default_dtype(dtype)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=how)}
        dcp.save(state, checkpoint_id=folder, process_group=group)
        state = {"optimizer": get_optimizer_state_dict(twin, again, options=how)}
        dcp.load(state, checkpoint_id=folder, process_group=group)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_optimizer_state_dict(twin, again, state["optimizer"], options=how)
    finally:
        torch.set_default_dtype(default)
    assert all(s["memory"].dtype == torch.float32 for s in again.state.values())
    assert again.param_groups[0]["lr"] == 0.1
    assert_same_run(optimizer, again, rank)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_flattened_state_on_disk(pool, size, dtype, tmp_path):
    pool.run(size, flattened_on_disk, str(tmp_path), dtype)


def flattened_of_another(group):
    """Whose memory it is comes along in a flattened state too."""
    rank, how = dist.get_rank(group), StateDictOptions(flatten_optimizer_state_dict=True)
    model = make_layers()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1, process_group=group)
    go_on(optimizer, range(3), rank)
    states = [get_optimizer_state_dict(model, optimizer, options=how)]
    dist.broadcast_object_list(states, 0, group=group)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        set_optimizer_state_dict(model, optimizer, states[0], options=how)
    assert len(seen) == (rank != 0)
    assert all("was saved by rank 0 of 2" in str(w.message) for w in seen)


def test_a_flattened_state_of_another_rank(pool):
    pool.run(2, flattened_of_another)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_what_torch_drops_of_a_frozen_parameter_is_told(make, flatten):
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_layers()
    optimizer = make(model.parameters(), lr=0.1, density=0.1)
    go_on(optimizer, range(3))
    model[1].bias.requires_grad_(False)
    model[1].bias.grad = None
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    memory = optimizer.state[model[1].bias]["memory"].clone()
    assert memory.any()
    twin = copy.deepcopy(model)
    again = make(twin.parameters(), lr=0.1, density=0.1)
    with pytest.warns(UserWarning, match="no state of parameter 3 of group 0, which was frozen"):
        set_optimizer_state_dict(twin, again, copy.deepcopy(saved), options=how)
    # As the warning says: torch takes it along while it is not frozen, and ours does always.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(optimizer.state_dict())
        assert torch.equal(again.state[twin[1].bias]["memory"], memory)
        twin[1].bias.requires_grad_(True)
        again = make(twin.parameters(), lr=0.1, density=0.1)
        set_optimizer_state_dict(twin, again, saved, options=how)
        assert torch.equal(again.state[twin[1].bias]["memory"], memory)


def test_a_frozen_parameter_without_memory_is_no_matter():
    model = make_layers()
    model[0].requires_grad_(False)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)
    go_on(optimizer, range(2))
    for flatten in (False, True):
        how = StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = get_optimizer_state_dict(model, optimizer, options=how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_optimizer_state_dict(model, optimizer, saved, options=how)


def test_a_group_that_is_frozen_as_a_whole_in_a_flattened_state():
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    model = make_layers()
    model[0].requires_grad_(False)
    optimizer, again = (gmc_cuda.GMC(two_groups(model), lr=lr, density=0.1) for lr in (0.1, 0.2))
    go_on(optimizer, range(2))
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    set_optimizer_state_dict(model, again, saved, options=how)
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.1]
    assert torch.equal(*(o.state[model[1].weight]["memory"] for o in (optimizer, again)))


def test_a_model_that_is_frozen_as_a_whole_in_a_flattened_state():
    """All groups have a place for whose the state is, also where they have no trained parameter."""
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    model = make_layers().requires_grad_(False)
    optimizer, again = (gmc_cuda.GMC(two_groups(model), lr=lr, density=0.1) for lr in (0.1, 0.2))
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    set_optimizer_state_dict(model, again, saved, options=how)
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.1]


def test_an_lr_tensor_stays_on_its_device():
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = torch.tensor(0.25)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"


def of_rank_0(say):
    _, optimizer = trained(group=None)
    sent = [pickle.dumps(optimizer)]
    dist.broadcast_object_list(sent, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pickle.loads(sent[0])
    return [str(w.message) for w in caught if "was saved by rank 0" in str(w.message)]


def test_another_ranks_copy_is_told(tmp_path):
    with Workers(2, tmp_path, of_rank_0) as workers:
        first, second = workers.results()
    assert not first
    assert len(second) == 1


def test_a_state_that_cannot_be_taken_changes_nothing():
    params, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 77.0
    params[0].data = params[0].data.double()
    with pytest.raises(TypeError, match="float64"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] != 77.0


@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter"])
def test_no_state_between_the_halves_of_a_step(pool, exchange):
    pool.run(2, state_of_an_open_step, exchange)


def state_of_an_open_step(group, exchange):
    param = torch.nn.Parameter(torch.ones(300))
    optimizer = gmc_cuda.GMC([param], lr=0.1, process_group=group, overlap=True, exchange=exchange)
    param.square().sum().backward()
    with pytest.raises(RuntimeError, match="state_dict between backward"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()
