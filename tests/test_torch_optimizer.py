"""What PyTorch asks of its own optimizers, asked of GMC and DGC at density 1 and below."""

import copy
import functools
import inspect
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import gmc_cuda
from support.problems import flat, memory_of, parameters, set_gradients

OPTIMIZERS = [gmc_cuda.GMC, gmc_cuda.DGC]
makers = pytest.mark.parametrize("make", OPTIMIZERS)
densities = pytest.mark.parametrize("density", [1.0, 0.1])


def go_on(params, optimizer, steps):
    for step in steps:
        set_gradients(params, 0, step)
        optimizer.step()


def trained(make, steps=3, **options):
    params = parameters()
    optimizer = make(params, **{"lr": 0.1, "density": 0.1, **options})
    go_on(params, optimizer, range(steps))
    return params, optimizer


def same(value, other):
    """Equality of nested containers with tensors in them."""
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[k], other[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other


# ------------------------------------------------------------------------------- the way it goes


class Affine(torch.nn.Module):
    """A matrix and a vector, and a loss to be made small or large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(10, 5))
        self.bias = torch.nn.Parameter(torch.randn(10))
        self.input = torch.randn(5)

    def forward(self):
        return (self.weight @ self.input + self.bias).square().sum()


SCHEDULERS = {
    "none": [],
    "step": [lambda o: lr_scheduler.StepLR(o, 10, gamma=0.9)],
    "linear": [lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4)],
    "lambda": [lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.99**step)],
    "plateau": [lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2)],
    "step and plateau": [
        lambda o: lr_scheduler.StepLR(o, 10, gamma=0.9),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    ],
    "exponential after linear": [
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, total_iters=9), lr_scheduler.ExponentialLR(o, 0.95)],
            milestones=[9],
        )
    ],
    "chained": [
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 5), lr_scheduler.CosineAnnealingLR(o, 60)], o
        )
    ],
    "restarts": [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7)],
    # These two change momentum as well.
    "one cycle": [lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=60)],
    "cyclic": [lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=9)],
    "averaged weights": [lambda o: swa_utils.SWALR(o, 0.003, anneal_epochs=9)],
}


def run(make, schedulers, steps=60, **options):
    """Returns the loss at the start and at the end, the weights, and lr and momentum on the way."""
    model = Affine()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.002}]
    optimizer = make(groups, **options)
    schedulers = [build(optimizer) for build in SCHEDULERS[schedulers]]
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    first, path = model().item(), []
    for _ in range(steps):
        with torch.no_grad():
            loss = optimizer.step(closure)
        for scheduler in schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.item())
            else:
                scheduler.step()
        path += [
            float(group[key]) for group in optimizer.param_groups for key in ("lr", "momentum")
        ]
    assert calls == [True] * steps, "called once a step, with gradients on"
    assert isinstance(loss, torch.Tensor)
    return first, model().item(), flat([model.weight, model.bias]), path


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before")
@pytest.mark.parametrize("schedulers", SCHEDULERS)
@densities
@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {"weight_decay": 0.01}),
        (gmc_cuda.GMC, {"maximize": True}),
        (gmc_cuda.DGC, {"weight_decay": 0.01}),
        (gmc_cuda.DGC, {"nesterov": True}),
    ],
)
def test_it_goes_where_torch_sgd_goes(make, options, density, schedulers):
    """At density 1 with the same steps, below in the same direction; lr and momentum alike."""
    options = {"lr": 0.003, "momentum": 0.8, **options}
    first, last, weights, path = run(make, schedulers, density=density, **options)
    _, sgd_last, sgd_weights, sgd_path = run(torch.optim.SGD, schedulers, **options)
    if density == 1.0 or "plateau" not in schedulers:  # whose lr depends on the loss
        assert path == sgd_path
    if density == 1.0:
        torch.testing.assert_close(weights, sgd_weights, rtol=1e-4, atol=1e-5)
    elif "maximize" in options:  # it grows exponentially
        assert math.log(last / first) / math.log(sgd_last / first) > 0.4
    else:
        assert (last - first) / (sgd_last - first) > 0.5


@makers
@densities
@pytest.mark.parametrize("form", [(), (1,)])
def test_learning_rate_tensors_are_scheduled_in_place(make, density, form):
    """lr as a tensor of no or of one dimension gives the steps of the number."""
    options = {"momentum_form": "iterate"} if make is gmc_cuda.GMC else {}
    lr = torch.full(form, 0.003)
    runs = []
    for given in (0.003, lr):
        optimizer = None

        def build(*args, **kwargs):
            nonlocal optimizer
            optimizer = make(*args, **kwargs)
            return optimizer

        runs.append(run(build, "step and plateau", lr=given, density=density, **options))
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() < 0.003
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(runs[0][3], runs[1][3], rtol=1e-5)


@makers
@densities
def test_averaged_weights(make, density):
    params, optimizer = trained(make, density=density)
    model = torch.nn.ParameterList(params)
    averaged = swa_utils.AveragedModel(model)
    start = flat(params)
    averaged.update_parameters(model)
    go_on(params, optimizer, [5])
    averaged.update_parameters(model)
    torch.testing.assert_close(flat(list(averaged.parameters())), (start + flat(params)) / 2)


@makers
@densities
def test_rosenbrock_by_turns(make, density):
    """Only one of two coordinates has a gradient at a step; below density 1 one is sent."""
    point = torch.nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = make([point], lr=1e-4, density=density)
    for step in range(1000):
        optimizer.zero_grad()
        x, y = point
        ((1 - x) ** 2 + 100 * (y - x**2) ** 2).backward()
        point.grad[step % 2] = 0
        optimizer.step()
    assert point.detach().dist(torch.ones(2)) < 0.9 * torch.tensor([1.5, 1.5]).dist(torch.ones(2))


@makers
def test_many_small_parameters(make):
    """More tensors than a list of an operator takes in one launch, with sizes of all kinds."""
    torch.manual_seed(1)
    values = [torch.randn(1 + i % 13) for i in range(600)]
    params, twins = [[torch.nn.Parameter(v.clone()) for v in values] for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer, sgd = make(params, density=1.0, **options), torch.optim.SGD(twins, **options)
    for step in range(3):
        for each, stepper in ((params, optimizer), (twins, sgd)):
            set_gradients(each, 0, step)
            stepper.step()
    torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=1e-6)
    assert len(optimizer.state) == 600


@makers
def test_groups_with_their_own_options(make):
    """Each group goes as an optimizer of its own would; lr 0 and momentum 0 are options."""
    own = [{"lr": 0.2, "momentum": 0.0}, {"weight_decay": 0.1, "maximize": True}, {"lr": 0.0},
           {"density": 0.5}]  # fmt: skip
    options = {"lr": 0.1, "momentum": 0.7, "density": 1.0}
    params, twins = parameters(), parameters()
    together = make([{"params": [p], **o} for p, o in zip(params, own, strict=False)], **options)
    alone = [make([p], **options | o) for p, o in zip(twins, own, strict=False)]
    for step in range(4):
        go_on(params, together, [step])
        set_gradients(twins, 0, step)
        for optimizer in alone:
            optimizer.step()
    assert torch.equal(flat(params), flat(twins))
    assert torch.equal(params[2], parameters()[2])
    assert not torch.equal(params[3], parameters()[3])


# ---------------------------------------------------------------------------------- gradients


@makers
@densities
def test_without_gradients_nothing_happens(make, density):
    params, optimizer = trained(make, steps=0, density=density, weight_decay=0.1)
    before = flat(params)
    optimizer.step()
    assert torch.equal(flat(params), before)
    assert not memory_of(optimizer, params).any()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(flat(params), before)
    assert not memory_of(optimizer, params).any()


@makers
@densities
def test_gradients_are_not_written_to(make, density):
    params, optimizer = trained(make, density=density, weight_decay=0.1, maximize=True)
    set_gradients(params, 0, 7)
    params[1].grad[0] = float("nan")
    grads = [p.grad for p in params]
    before = [g.clone() for g in grads]
    optimizer.step()
    for param, grad, old in zip(params, grads, before, strict=True):
        assert param.grad is grad
        torch.testing.assert_close(grad, old, rtol=0, atol=0, equal_nan=True)


@makers
@densities
@pytest.mark.parametrize("way", ["transposed", "expanded", "strided", "flipped"])
def test_gradients_of_any_layout(make, density, way):
    """Autograd makes expanded ones (of a sum) and transposed ones (of a product)."""
    torch.manual_seed(2)
    values = torch.randn(6, 6)
    layouts = {
        "transposed": lambda g: g.t().contiguous().t(),
        "expanded": lambda g: g[:, :1].expand(6, 6),
        "strided": lambda g: torch.stack([g, 0 * g], -1)[..., 0],
        "flipped": lambda g: g.flip(0).t(),
    }
    params = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    optimizers = [make([p], lr=0.1, density=density) for p in params]
    for _ in range(3):
        grad = layouts[way](torch.randn(6, 6))
        params[0].grad, params[1].grad = grad, grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(*params)
    for name, tensor in optimizers[0].state[params[0]].items():
        assert torch.equal(tensor, optimizers[1].state[params[1]][name])


@makers
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(make, to_none):
    params, optimizer = trained(make)
    optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else not p.grad.any() for p in params)
    before = flat(params)
    optimizer.step()  # gradients of zero are gradients: momentum goes on
    assert not torch.equal(flat(params), before)


def test_parameters_that_cannot_be_optimized():
    leaf = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        gmc_cuda.GMC(leaf, lr=0.1)
    with pytest.raises(ValueError, match="non-leaf"):
        gmc_cuda.GMC([leaf * 2], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        gmc_cuda.GMC([], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        gmc_cuda.GMC([{"params": [leaf]}, {"params": [leaf]}], lr=0.1)


@makers
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group(make):
    """torch.optim.SGD steps twice and warns; here one of two memories would be in no state_dict."""
    param, other = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="params: parameter 2 of group 0 appears twice"):
        make([param, other, param], lr=0.1)
    optimizer = make([other], lr=0.1)
    with pytest.raises(ValueError, match="params: parameter 1 of group 1 appears twice"):
        optimizer.add_param_group({"params": [param, param]})
    assert len(optimizer.param_groups) == 1


# ----------------------------------------------------------------------- groups that come later


@makers
@densities
def test_a_group_that_is_added(make, density):
    params, twins = parameters(), parameters()
    optimizer = make(params[:4], lr=0.1, density=density)
    twin = make(twins[:4], lr=0.1, density=density)
    go_on(params[:4], optimizer, range(3))
    go_on(twins[:4], twin, range(3))
    optimizer.add_param_group({"params": params[4:], "lr": 0.3})
    assert {k: v for k, v in optimizer.param_groups[1].items() if k != "params"} == (
        {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "previous_lr")}
        | {"lr": 0.3} | ({"previous_lr": None} if make is gmc_cuda.GMC else {})
    )  # fmt: skip
    for step in range(3, 6):
        set_gradients(params[:4], 0, step)
        set_gradients(params[4:], 1, step)
        optimizer.step()
        go_on(twins[:4], twin, [step])
    assert torch.equal(flat(params[:4]), flat(twins[:4])), "the old group goes on undisturbed"
    other = make(twins[4:], lr=0.3, density=density)
    for step in range(3, 6):
        set_gradients(twins[4:], 1, step)
        other.step()
    assert torch.equal(flat(params[4:]), flat(twins[4:]))
    for wrong in (params[:1], [params[0] * 2]):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": wrong})
        assert len(optimizer.param_groups) == 2
    go_on(params, optimizer, [6])


# ------------------------------------------------------------------------------------ state_dict


@makers
@densities
def test_loading_neither_changes_nor_keeps_what_it_is_given(make, density):
    _, optimizer = trained(make, density=density)
    params, twin = trained(make, steps=0, density=density)
    given = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(given)
    twin.load_state_dict(given)
    assert same(given, before)
    go_on(params, twin, range(3))
    assert same(given, before)


@makers
@densities
def test_the_state_of_equal_optimizers_is_equal(make, density):
    """And a group that stands twice in param_groups has the same parameters twice."""
    _, optimizer = trained(make, density=density)
    _, twin = trained(make, density=density)
    assert same(optimizer.state_dict(), twin.state_dict())
    twin.param_groups.extend(twin.param_groups)
    groups = twin.state_dict()["param_groups"]
    assert groups == 2 * optimizer.state_dict()["param_groups"]


@makers
@densities
def test_states_without_an_option(make, density):
    """Each in turn, as in a checkpoint from before the option came."""
    _, optimizer = trained(make, density=density, weight_decay=0.01)
    options = set(optimizer.param_groups[0]) - {"params", "saved_by"}  # the latter says whose it is
    assert len(options) > 5
    for missing in options:
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            del group[missing]
        params, twin = trained(make, density=density, weight_decay=0.01, steps=0)
        twin.load_state_dict(state)
        go_on(params, twin, range(2))
        assert missing in twin.param_groups[0]


@makers
@pytest.mark.parametrize("from_named", [True, False])
def test_named_and_unnamed_states_fit_each_other(make, from_named):
    runs = []
    for named in (from_named, not from_named):
        params = parameters()
        given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        runs.append((params, make(given, lr=0.1, density=0.1)))
    (params, optimizer), (twins, twin) = runs
    go_on(params, optimizer, range(3))
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(memory_of(twin, twins), memory_of(optimizer, params))
    names = [f"p{i}" for i in range(len(params))]
    assert twin.param_groups[0]["param_names"] == names
    go_on(twins, twin, range(2))


@makers
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), np.float32(0.1), np.float64(0.1), 1])
def test_files_load_with_weights_only(make, lr):
    """Whatever kind of number an option is."""
    params, optimizer = trained(make, lr=lr, momentum=np.float32(0.5), density=np.float64(0.1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twins, twin = trained(make, lr=7.0, steps=0)
    for twin_param, param in zip(twins, params, strict=True):
        twin_param.data.copy_(param)
    twin.load_state_dict(state)
    for each, stepper in ((params, optimizer), (twins, twin)):
        go_on(each, stepper, range(3, 6))
    assert torch.equal(flat(params), flat(twins))


@pytest.mark.gpu
@makers
@densities
def test_a_state_of_the_cpu_on_a_gpu(make, density):
    params, optimizer = trained(make, density=density)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    twins = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    twin = make(twins, lr=0.1, density=density)
    twin.load_state_dict(state)
    assert same(state, before)
    for step in range(3, 6):
        go_on(params, optimizer, [step])
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad.cuda()
        twin.step()
    assert torch.equal(flat(params), flat(twins).cpu())


# ---------------------------------------------------------------------------------------- copies


@makers
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_copy_has_every_public_attribute(make, copied):
    _, optimizer = trained(make)
    twin = copied(optimizer)
    names = {name for name in vars(optimizer) if not name.startswith("_")}
    assert names == {name for name in vars(twin) if not name.startswith("_")}
    assert {"defaults", "param_groups", "state"} <= names
    assert optimizer.defaults.items() <= twin.defaults.items()
    assert repr(twin) == repr(optimizer)


# ----------------------------------------------------------------------------------------- hooks


@makers
def test_hooks_around_a_step(make):
    """The global ones outside the optimizer's own; arguments can be changed; handles remove."""
    params, optimizer = trained(make)
    set_gradients(params, 0, 3)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: (calls.append("before"), ((o, lambda: 5.0), {}))[1]
        ),
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: calls.append(("after", args[1](), o is optimizer))
        ),
    ]
    try:
        assert optimizer.step() == 5.0
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global before", "before", ("after", 5.0, True), "global after"]
    assert optimizer.step() is None
    assert len(calls) == 4


@makers
def test_hooks_around_state_dict(make):
    params, optimizer = trained(make)
    calls = []

    def say(word):
        return lambda *_: calls.append(word)

    optimizer.register_state_dict_pre_hook(say("second"))
    optimizer.register_state_dict_pre_hook(say("first"), prepend=True)
    optimizer.register_state_dict_post_hook(say("third"))
    optimizer.register_state_dict_post_hook(
        lambda _, state: calls.append("fourth") or {**state, "more": sorted(state["state"][0])}
    )
    handle = optimizer.register_state_dict_post_hook(say("removed"))
    handle.remove()
    state = optimizer.state_dict()
    assert calls == ["first", "second", "third", "fourth"]
    assert state["more"] == ["memory", "momentum_buffer"]
    early = []
    optimizer.register_state_dict_post_hook(
        lambda _, state: early.append(1) or {**state, "early": True}, prepend=True
    )
    state = optimizer.state_dict()
    assert early
    assert state["early"]
    assert "saved_by" in state["param_groups"][0]
    twins, twin = trained(make, steps=0)
    twin.load_state_dict(state)
    assert torch.equal(memory_of(twin, twins), memory_of(optimizer, params))


@makers
def test_hooks_around_load_state_dict(make):
    _, optimizer = trained(make)
    params, twin = trained(make, steps=0)
    calls = []

    def scale(_, state):
        calls.append("second")
        for group in state["param_groups"]:
            group["lr"] = 4.0

    def replace(_, state):
        calls.append("first")
        return copy.deepcopy(state)

    twin.register_load_state_dict_pre_hook(scale)
    twin.register_load_state_dict_pre_hook(replace, prepend=True)
    twin.register_load_state_dict_post_hook(lambda o: calls.append("fourth"))
    twin.register_load_state_dict_post_hook(
        lambda o: calls.append(
            ("third", o.param_groups[0]["lr"], memory_of(o, params).any().item())
        ),
        prepend=True,
    )
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    twin.load_state_dict(state)
    assert calls == ["first", "second", ("third", 4.0, True), "fourth"]
    assert same(state, before)
    assert twin.param_groups[0]["lr"] == 4.0


# ----------------------------------------------------------------------------- names and defaults


@makers
def test_what_is_printed(make):
    _, optimizer = trained(make, momentum=0.7, density=0.25)
    text = repr(optimizer)
    assert text.startswith(f"{make.__name__} (\nParameter Group 0\n")
    assert "momentum: 0.7" in text
    assert "density: 0.25" in text
    assert "lr: 0.1" in text


@makers
def test_the_profiler_sees_it(make):
    class Mine(make):
        pass

    for kind in (make, Mine):
        params, optimizer = trained(kind)
        set_gradients(params, 0, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts[f"Optimizer.step#{kind.__name__}.step"] == 1
        assert counts[f"Optimizer.zero_grad#{kind.__name__}.zero_grad"] == 1


@makers
def test_defaults_are_the_options_of_new_groups(make):
    _, optimizer = trained(make, momentum=0.6)
    assert optimizer.defaults["momentum"] == 0.6
    arguments = set(inspect.signature(make).parameters) & set(optimizer.param_groups[0])
    assert arguments - {"params"} <= optimizer.defaults.keys()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    for name in optimizer.defaults:
        assert optimizer.param_groups[1][name] == optimizer.defaults[name]


@makers
@densities
def test_an_ordinary_run_warns_of_nothing(make, density):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, optimizer = trained(make, density=density, weight_decay=0.1)
        twins, twin = trained(make, steps=0, density=density)
        twin.load_state_dict(optimizer.state_dict())
        go_on(twins, copy.deepcopy(twin), range(2))


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_of_a_conjugate(make, overlap):
    """torch stores it with its sign elsewhere, and reads it with that."""
    moved = []
    for each in (torch.optim.SGD, functools.partial(make, density=1.0, overlap=overlap)):
        b = torch.nn.Parameter(torch.ones(1))
        optimizer = each([b], lr=1.0, momentum=0.0)
        (torch.complex(torch.ones(1), b).conj() * torch.tensor([1 + 2j])).real.sum().backward()
        optimizer.step()
        moved.append(b.item())
    assert moved == [-1.0, -1.0]


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_a_users_own_entries_in_state_are_saved_and_loaded(make):
    params, others = parameters(), parameters()
    optimizer, again = make(params, lr=0.1), make(others, lr=0.1)
    set_gradients(params, 0, 0)
    optimizer.step()
    optimizer.state[params[0]].update(average=torch.full_like(params[0], 2.0), count=3)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    assert again.state[others[0]]["count"] == 3
    assert torch.equal(again.state[others[0]]["average"], torch.full_like(others[0], 2.0))
    assert again.state[others[0]]["average"] is not saved["state"][0]["average"]


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_an_optimizer_made_in_inference_mode(make):
    params = parameters()
    with torch.inference_mode():
        optimizer = make(params, lr=0.1)
    set_gradients(params, 0, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.average_memory_()
    optimizer.state[params[0]]["memory"].zero_()
