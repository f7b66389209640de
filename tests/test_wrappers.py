"""What LocalUpdates and NodeAverage share: each public method of torch.optim.Optimizer is right."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

import gmc_cuda
from support.meshes import mesh_of
from support.problems import flat, parameters, same_on_all_ranks, set_gradients

KINDS = ["LocalUpdates", "NodeAverage"]

# Why these of torch.optim.Optimizer are right where a wrapper inherits them.
INHERITED = {
    "OptimizerPreHook": "a type",
    "OptimizerPostHook": "a type",
    "_optimizer_step_code": "does nothing; the profiler looks at param_groups and state there",
    "profile_hook_step": "static; calls the hooks of the object whose step() it is around",
    "_group_tensors_by_device_and_dtype": "static",
    "_process_value_according_to_param_policy": "static",
    "_patch_step_function": "patches the step() of the object's own class",
    "_accelerator_graph_capture_health_check": "called by the step() of Adam alone, on itself",
    "_cuda_graph_capture_health_check": "called by the step() of Adam alone, on itself",
    "register_step_pre_hook": "the object has hooks of its own, see _make_hooks",
    "register_step_post_hook": "the object has hooks of its own, see _make_hooks",
    "register_state_dict_pre_hook": "the object has hooks of its own, see _make_hooks",
    "register_state_dict_post_hook": "the object has hooks of its own, see _make_hooks",
    "register_load_state_dict_pre_hook": "the object has hooks of its own, see _make_hooks",
    "register_load_state_dict_post_hook": "the object has hooks of its own, see _make_hooks",
}
# NodeAverage has param_groups of its own, over the parameters whose gradients users see.
INHERITED_BY_NODE_AVERAGE = {"zero_grad": "goes through its own param_groups"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_torch_is_written_or_right_as_inherited(kind):
    wrapper = getattr(gmc_cuda, kind)
    right = dict(INHERITED)
    if kind == "NodeAverage":
        right |= INHERITED_BY_NODE_AVERAGE
    for name, value in vars(torch.optim.Optimizer).items():
        if not callable(value) and not isinstance(value, staticmethod):
            continue
        owner = next(cls for cls in wrapper.__mro__ if name in vars(cls))
        assert owner is not torch.optim.Optimizer or name in right, name


def make(kind, params, group, **options):
    if kind == "LocalUpdates":
        options["step_ahead"] = 0.0  # after each round the workers have the same
        outer = functools.partial(gmc_cuda.GMC, lr=0.7, density=0.1, process_group=group)
        return gmc_cuda.LocalUpdates(torch.optim.AdamW(params, lr=0.01), outer, every=1, **options)
    inner = functools.partial(gmc_cuda.GMC, lr=0.1, density=0.1)
    return gmc_cuda.NodeAverage(params, inner, mesh_of((2, 2)))


def run(pool, kind, function, *args):
    pool.run(4, function, kind, *args)


every_kind = pytest.mark.parametrize("kind", KINDS)


def hooked(group, kind):
    """Hooks run around the whole step, the inner optimizer's around its own."""
    params = parameters()
    optimizer = make(kind, params, group)
    told, seen = [], []

    def note(name, result=None):
        def hook(which, *args):
            told.append(name)
            seen.append(flat(params))
            return result

        return hook

    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    inner = optimizer.inner
    inner.register_step_pre_hook(note("inner pre"))
    inner.register_step_post_hook(note("inner post"))
    everywhere = register_optimizer_step_post_hook(
        lambda which, *args: told.append(type(which).__name__)
    )
    start = flat(params)
    set_gradients(params, dist.get_rank(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
        schedule.step()
    everywhere.remove()
    name = type(inner).__name__
    outer = ["GMC"] if kind == "LocalUpdates" else []
    assert told == ["pre", "inner pre", "inner post", name, *outer, "post", kind]
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[-1], flat(params))
    assert same_on_all_ranks(group, params)
    assert not torch.equal(seen[-1], start)
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


@every_kind
def test_step_hooks_are_around_the_whole_step(pool, kind):
    run(pool, kind, hooked)


def arguments_changed(group, kind):
    optimizer = make(kind, parameters(), group)
    optimizer.register_step_pre_hook(lambda which, args, kwargs: (args[:1], {"closure": lambda: 5}))
    assert optimizer.step() == 5


@every_kind
def test_a_step_hook_may_change_the_arguments(pool, kind):
    run(pool, kind, arguments_changed)


def dict_hooks(group, kind):
    params = parameters()
    optimizer, told = make(kind, params, group), []
    optimizer.register_state_dict_pre_hook(lambda which: told.append("saving"))
    optimizer.register_state_dict_post_hook(lambda which, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda which, saved: (
            told.append("loading") or {k: v for k, v in saved.items() if k != "mine"}
        )
    )
    optimizer.register_load_state_dict_post_hook(lambda which: told.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.load_state_dict(saved)
    assert saved["mine"] == 1
    assert told == ["saving", "loading", "loaded"]
    for step in range(2):
        set_gradients(params, dist.get_rank(), step)
        optimizer.step()
    assert same_on_all_ranks(group, params)


@every_kind
def test_state_dict_hooks(pool, kind):
    run(pool, kind, dict_hooks)


def small_things(group, kind):
    params = parameters()
    optimizer = make(kind, params, group)
    assert kind in repr(optimizer)
    assert "lr: " in repr(optimizer)
    with pytest.raises(TypeError, match=r"copy.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(optimizer)
    for to_none in (False, True):
        set_gradients(params, 0, 0)
        optimizer.zero_grad(set_to_none=to_none)
        assert all(p.grad is None if to_none else not p.grad.any() for p in params)
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"]
    assert optimizer.state
    assert isinstance(optimizer.stats()["steps"], int)
    assert optimizer.process_group is not None
    with pytest.raises(AttributeError):
        optimizer.nothing_of_the_kind  # noqa: B018
    optimizer.average_memory_()


@every_kind
def test_the_rest_of_the_interface(pool, kind):
    run(pool, kind, small_things)


def leftovers(group, kind):
    """An error takes what a scaler left away with it."""
    params = parameters()
    optimizer = make(kind, params, group)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.full((), 1024.0)

    def fail(*args):
        raise KeyError("mine")

    handle = optimizer.inner.register_step_pre_hook(fail)
    if kind == "NodeAverage":
        optimizer.engine.scaled_together = True
    with pytest.raises(KeyError):
        optimizer.step()
    handle.remove()
    if kind == "NodeAverage":
        optimizer.engine.scaled_together = False
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    set_gradients(params, dist.get_rank(), 0)
    optimizer.step()
    assert same_on_all_ranks(group, params)


@every_kind
def test_an_error_leaves_nothing_of_a_scaler(pool, kind):
    run(pool, kind, leftovers)


def twice(group, kind):
    """A layer that is frozen on every worker keeps its bits, in the model and in the copies."""
    rank, params = dist.get_rank(), parameters()
    optimizer = make(kind, params, group)
    for step in range(6):
        if step in (2, 4):
            before = params[0].detach().clone()
            params[0].requires_grad_(step == 4)
        set_gradients([p for p in params if p.requires_grad], rank, step)
        optimizer.step()
        optimizer.zero_grad()
        assert same_on_all_ranks(group, params)
        if step in (2, 3):
            assert torch.equal(params[0].detach(), before)


@every_kind
def test_a_frozen_layer_keeps_its_bits(pool, kind):
    run(pool, kind, twice)
