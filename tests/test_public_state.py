"""What users do with parameters, param_groups and state between steps, beside torch.optim.SGD.

At density 1 one worker's GMC or DGC is torch.optim.SGD. So each test does the same to both, and the
parameters and momentum buffers must stay the same; or the optimizer must refuse, by name, before
anything has changed, and go on like SGD once the cause is mended. Below density 1 there is no SGD
to compare with, and the mass equation of one worker takes its place:
memory_{t+1} + a_t = memory_t + g_t + weight_decay * w_t + momentum * a_{t-1}.
"""

import contextlib
import copy
import functools
import gc
import io
import pickle
import weakref
from collections import defaultdict

import pytest
import torch
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import gmc_cuda

CAP = 30 * 4 / 2**20  # MiB: several buckets


def optimizers(*names):
    return pytest.mark.parametrize("make", [KINDS[name] for name in names], ids=names)


def local_updates(groups, **options):
    """Rounds of one step of twice the size, of which the outer step takes half: SGD's steps.

    A parameter that takes no part in the exchange goes twice as far.
    """
    groups = [{**group, "lr": 2 * group["lr"]} for group in groups]
    outer = functools.partial(gmc_cuda.GMC, lr=0.5, momentum=0.0, density=1.0)
    return gmc_cuda.LocalUpdates(torch.optim.SGD(groups, **options), outer, every=1)


_dense = {"density": 1.0, "bucket_cap_mb": CAP}
KINDS = {
    "GMC": functools.partial(gmc_cuda.GMC, **_dense),
    "GMC-overlap": functools.partial(gmc_cuda.GMC, **_dense, overlap=True),
    "GMC-iterate": functools.partial(gmc_cuda.GMC, **_dense, momentum_form="iterate"),
    "GMC-nesterov": functools.partial(gmc_cuda.GMC, **_dense, nesterov=True),
    "DGC": functools.partial(gmc_cuda.DGC, **_dense),
    "DGC-overlap": functools.partial(gmc_cuda.DGC, **_dense, overlap=True),
    "DGC-nesterov": functools.partial(gmc_cuda.DGC, **_dense, nesterov=True),
    "LocalUpdates": local_updates,
}


@pytest.fixture
def collect_garbage():
    """gc.collect(), but only of what the test has made: the rest takes it 0.2 s a time."""
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


every_kind = optimizers("GMC", "GMC-overlap", "DGC")
overlapped = optimizers("GMC-overlap", "DGC-overlap")
not_overlapped = optimizers("GMC", "DGC")

SHAPES = [(8, 3), (5,), (4, 4), (2, 3, 4), (3, 4, 2, 2), (1,)]
OPTIONS = [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1},
           {"lr": 0.2, "momentum": 0.8, "maximize": True}]  # fmt: skip


class Run:
    """An optimizer over six parameters in three groups, whose gradients depend on the step only.

    Attributes:
        params: the parameters that gradients are made for, whatever the optimizer knows of.
        gone: parameters that were taken from the optimizer, with the values they must keep.
        ours: whether the optimizer is not torch.optim.SGD.
        loose: whether some parameter has been rounded to 16 bits.
    """

    def __init__(self, make, frozen=list):
        generator = torch.Generator().manual_seed(1)
        self.params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        groups = [{"params": self.params[2 * g : 2 * g + 2], **o} for g, o in enumerate(OPTIONS)]
        groups[1]["params"] += frozen()
        self.optimizer = make(groups, lr=0.1, momentum=0.9)
        self.ours = type(self.optimizer) is not torch.optim.SGD
        self.gone = []
        self.loose = False
        self.steps = 0  # backward passes

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def model(self):
        """The parameters as a module, for what users do with a whole model."""
        return torch.nn.ParameterList(self.params)

    def backward(self, without=()):
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        terms = []
        for i, param in enumerate(self.params):
            gradient = torch.randn(param.shape, generator=generator)
            if param.requires_grad and i not in without:
                terms.append((param * gradient.to(param)).sum().float())
        if terms:
            sum(terms).backward()

    def step(self, without=()):
        self.backward(without)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def momentum(self, param):
        """What torch.optim.SGD calls momentum_buffer; nothing at all is as good as zeros."""
        held = self.state.get(param, {})
        # With momentum_form="iterate" it is called otherwise.
        values = [held[key] for key in ("momentum_buffer", "aggregate") if key in held]
        return values[0].detach() if values else torch.zeros_like(param)

    def memory(self, param):
        held = self.state.get(param, {})
        return held["memory"].detach() if "memory" in held else torch.zeros_like(param)

    def snapshot(self):
        each = [(p.detach(), self.memory(p), self.momentum(p)) for p in self.params]
        return [tuple(t.clone() for t in tensors) for tensors in each]


def assert_unchanged(run, snapshot):
    for i, (now, before) in enumerate(zip(run.snapshot(), snapshot, strict=True)):
        for name, value, old in zip(("parameter", "memory", "momentum"), now, before, strict=True):
            assert torch.equal(value, old), f"{name} {i} has changed"


def assert_same(run, sgd):
    """Equal parameters and momentum; at density 1 nothing waits in memory."""
    close = {"rtol": 2e-2, "atol": 2e-2} if run.loose else {"rtol": 1e-5, "atol": 2e-6}
    for i, (param, twin) in enumerate(zip(run.params, sgd.params, strict=True)):
        assert param.dtype == twin.dtype
        assert param.shape == twin.shape
        assert_close(param, twin, f"parameter {i}", **close)
        assert_close(run.momentum(param), sgd.momentum(twin), f"momentum {i}", **close)
        assert not run.memory(param).any(), f"memory {i} is not empty"
    for param, values in run.gone:
        assert torch.equal(param, values), "a parameter that the optimizer no longer has, has moved"


def assert_close(value, expected, name, **close):
    value, expected = value.detach().double(), expected.detach().double()
    if not torch.allclose(value, expected, **close):  # a fraction of assert_close's time
        torch.testing.assert_close(value, expected, msg=lambda text: f"{name}: {text}", **close)


def assert_state_fits(run):
    """float32, shaped like the parameter and where it is, once a step was made."""
    for param in run.params:
        for key, value in run.state.get(param, {}).items():
            assert value.dtype == torch.float32, f"{key} is {value.dtype}"
            assert value.shape == param.shape
            assert value.device == param.device


def compare(make, *changes):
    """Two steps, then after each change two more, compared with SGD's all the way."""
    nesterov = getattr(make, "keywords", {}).get("nesterov", False)
    sgd, ours = Run(functools.partial(torch.optim.SGD, nesterov=nesterov)), Run(make)
    for change in [None, *changes]:
        if change is not None:
            for run in (ours, sgd):
                with torch.no_grad():
                    change(run)
            assert_same(ours, sgd)
        for without in ((), {1}):
            for run in (ours, sgd):
                run.step(without)
            assert_same(ours, sgd)
    if make is not local_updates:  # whose state is the inner optimizer's
        assert_state_fits(ours)
    assert ours.optimizer.stats()["steps"] == ours.steps
    return ours, sgd


def pair(make, **options):
    return Run(make, **options), Run(torch.optim.SGD, **options)


def go_on(runs, steps=1):
    for _ in range(steps):
        for run in runs:
            run.step()
        assert_same(*runs)


def assert_refused(run, match):
    """A backward pass and a step, one of which is refused and changes nothing.

    The gradients of that pass are then dropped, as by torch.optim.SGD if it had not been made.
    """
    snapshot = run.snapshot()
    with pytest.raises((TypeError, ValueError), match=match):
        run.backward()
        run.optimizer.step()
    assert_unchanged(run, snapshot)
    run.optimizer.zero_grad()
    run.steps -= 1


# -------------------------------------------------------------------------- parameters are replaced


def replace(i, new_from, state="moved", in_place=False):
    """The parameter is replaced by new_from(it), as pruning and a larger vocabulary do it."""

    def change(run):
        old = run.params[i]
        new = run.params[i] = Parameter(new_from(old.detach()).clone())
        for group in run.groups:
            if in_place:
                for j, param in enumerate(group["params"]):
                    if param is old:
                        group["params"][j] = new
            else:
                group["params"] = [new if p is old else p for p in group["params"]]
        if state == "moved":
            run.state[new] = {k: new_from(v).clone() for k, v in run.state.pop(old).items()}
        elif state == "dropped":
            del run.state[old]
        run.gone.append((old, old.detach().clone()))

    return change


def grown(tensor):
    """Three more rows, of zeros."""
    return torch.cat([tensor, torch.zeros_like(tensor[:1]).repeat(3, *[1] * (tensor.dim() - 1))])


def rounded(i):
    """By a bfloat16 one, whose state remains float32."""

    def change(run):
        run.loose = True
        replace(i, lambda t: t, state="moved")(run)
        run.params[i].data = run.params[i].data.bfloat16()

    return change


REPLACED = {
    "shrunk": [replace(0, lambda t: t[:5])],
    "shrunk in place": [replace(0, lambda t: t[:5], in_place=True)],
    "grown": [replace(0, grown)],
    "grown, then shrunk": [replace(0, grown), replace(0, lambda t: t[1:4])],
    "reshaped": [replace(3, lambda t: t.reshape(6, 4))],
    "transposed": [replace(0, lambda t: t.t())],
    "shuffled": [replace(2, lambda t: t.flip(0).roll(1, dims=1))],
    "equal": [replace(2, lambda t: t)],
    "the only one of one element": [replace(5, lambda t: t)],
    "shrunk to nothing": [replace(1, lambda t: t[:0]), replace(0, lambda t: t[:4])],
    "rounded": [rounded(0)],
    "two at once": [lambda run: (replace(0, grown)(run), replace(4, lambda t: t[:2])(run))],
    "all": [lambda run: [replace(i, lambda t: t)(run) for i in range(len(SHAPES))]],
    "all, twice": 2 * [lambda run: [replace(i, grown)(run) for i in range(len(SHAPES))]],
    "a fresh start": [replace(0, lambda t: t[:5], state="dropped")],
    "a fresh start, grown": [replace(4, grown, state="dropped")],
    "the old state stays behind": [replace(0, lambda t: t[:5], state="left")],
    "all without state": [lambda run: [replace(i, grown, "dropped")(run) for i in range(6)]],
}


@every_kind
@pytest.mark.parametrize("way", REPLACED)
def test_a_replaced_parameter_is_trained_and_the_old_one_is_not(make, way):
    compare(make, *REPLACED[way])


@every_kind
def test_a_parameter_is_replaced_before_the_first_step(make):
    runs = pair(make)
    for run in runs:
        with torch.no_grad():
            replace(0, grown, state="left")(run)
            run.state.pop(run.gone[0][0], None)
    go_on(runs, 3)


# ---------------------------------------------------------------------- a model is moved, converted


@pytest.fixture
def swapped():
    """Keeps Parameter objects in a move between devices, as .cuda() does by itself."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(params=["module", "module, swapped", "data"])
def by_data(request):
    """How parameters are converted: by module.to(), in its two ways, or by param.data = ..."""
    torch.__future__.set_swap_module_params_on_conversion(request.param == "module, swapped")
    yield request.param == "data"
    torch.__future__.set_swap_module_params_on_conversion(False)


def gradients_on_meta(run):
    for param in run.params:
        param.grad = torch.empty_like(param)


@optimizers("GMC", "GMC-overlap", "DGC", "LocalUpdates")
def test_a_model_moves_before_the_first_step(make, swapped):
    """ "meta" stands for the GPU: it has no values, but whatever mixes it with the CPU fails."""
    run = Run(make)
    run.model().to("meta")
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    gradients_on_meta(run)
    run.optimizer.step()
    for param in run.params:
        assert param.device.type == "meta"
        for value in run.state.get(param, {}).values():
            assert value.device.type == "meta"
            assert value.shape == param.shape


@every_kind
@pytest.mark.parametrize("state_moves_too", [True, False])
def test_a_model_moves_between_two_steps(make, swapped, state_moves_too):
    """SGD asks for the state to be moved as well; memory that was not follows its parameter."""
    run = Run(make)
    run.step()
    run.model().to("meta")
    if state_moves_too:
        for held in run.state.values():
            for key, value in held.items():
                held[key] = value.to("meta")
    for _ in range(2):
        gradients_on_meta(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
    for param in run.params:
        for value in run.state[param].values():
            assert value.device.type == "meta"
            assert value.shape == param.shape


@every_kind
def test_a_model_made_on_meta_gets_its_values_later(make, swapped):
    """Deferred initialisation, with the optimizer made before it."""
    values = [p.detach().clone() for p in Run(torch.optim.SGD).params]
    with torch.device("meta"):
        params = [Parameter(torch.empty(shape)) for shape in SHAPES]
    groups = [{"params": params[2 * g : 2 * g + 2], **o} for g, o in enumerate(OPTIONS)]
    run, sgd = Run(make), Run(torch.optim.SGD)
    run.params, run.optimizer = params, make(groups, lr=0.1, momentum=0.9)
    run.model().to_empty(device="cpu")
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    for _ in range(3):
        for each in (run, sgd):
            each.step()
        assert_same(run, sgd)


def converted(dtype, only=None, by_data=False):
    def change(run):
        run.loose = True
        chosen = run.params if only is None else [run.params[i] for i in only]
        if by_data:
            for param in chosen:
                param.data = param.data.to(dtype)
        else:
            torch.nn.ParameterList(chosen).to(dtype)

    return change


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("only", [None, [1, 2, 4]], ids=["all", "some"])
def test_a_model_is_converted_to_16_bits_and_back(make, dtype, only, by_data):
    compare(make, converted(dtype, only, by_data), converted(torch.float32, None, by_data))


@every_kind
def test_a_model_goes_from_one_16_bit_type_to_the_other(make, by_data):
    types = (torch.bfloat16, torch.float16, torch.bfloat16)
    compare(make, *[converted(dtype, None, by_data) for dtype in types])


@every_kind
def test_a_conversion_leaves_the_state_in_float32(make, by_data):
    run = Run(make)
    run.step()
    before = [run.momentum(p).clone() for p in run.params]
    converted(torch.bfloat16, None, by_data)(run)
    assert all(torch.equal(run.momentum(p), m) for p, m in zip(run.params, before, strict=True))
    run.step(without=range(len(SHAPES)))  # a step with no gradient at all
    assert all(torch.equal(run.momentum(p), m) for p, m in zip(run.params, before, strict=True))
    run.step()
    assert_state_fits(run)


@every_kind
def test_float64_is_refused_by_name_until_it_is_converted_back(make, by_data):
    runs = run, _ = pair(make)
    go_on(runs)
    converted(torch.float64, [3], by_data)(run)
    assert_refused(run, r"parameter 1 .*of group 1.*torch\.float64")
    converted(torch.float32, [3], by_data)(run)
    run.loose = False
    go_on(runs, 2)


@not_overlapped
def test_a_step_refused_for_float64_is_made_once_it_can_be(make):
    """The gradients are converted back with the model, and are not lost."""
    runs = run, sgd = pair(make)
    go_on(runs)
    run.model().double()
    run.backward()
    with pytest.raises((TypeError, ValueError), match="float64"):
        run.optimizer.step()
    run.model().float()
    sgd.backward()
    for each in runs:
        each.optimizer.step()
        each.optimizer.zero_grad()
    go_on(runs)


@every_kind
@pytest.mark.parametrize("way", ["with gaps", "expanded"])
def test_a_layout_that_cannot_be_stepped_is_refused_by_name(make, way):
    runs = run, _ = pair(make)
    go_on(runs)
    param, before = run.params[2], run.params[2].data
    gaps = torch.cat([before, before], 1)[:, ::2]
    param.data = gaps if way == "with gaps" else before[:1].expand(4, 4)
    assert_refused(run, r"parameter 0 .*of group 1.*strides")
    param.data = before
    go_on(runs, 2)


# ------------------------------------------------------------------------------------------- layout


def to_format(memory_format):
    return lambda run: run.model().to(memory_format=memory_format)


def laid_out(i, layout):
    def change(run):
        run.params[i].data = layout(run.params[i].data)

    return change


def transposed(i):
    """The state is transposed as well, which makes views of it."""

    def change(run):
        run.params[i].data = run.params[i].data.t()
        for key, value in run.state[run.params[i]].items():
            run.state[run.params[i]][key] = value.t()

    return change


LAYOUTS = {
    "channels_last": [to_format(torch.channels_last)],
    "channels_last and back": [to_format(torch.channels_last), to_format(torch.contiguous_format)],
    "on, off and on": [to_format(f) for f in 2 * [torch.channels_last, torch.contiguous_format]],
    "by columns": [laid_out(0, lambda t: t.t().contiguous().t())],
    "by columns and back": [
        laid_out(0, lambda t: t.t().contiguous().t()),
        laid_out(0, lambda t: t.contiguous()),
    ],
    "a square one seen transposed": [laid_out(2, lambda t: t.t())],
    "a square one seen transposed, twice": 2 * [laid_out(2, lambda t: t.t())],
    "three dimensions in another order": [
        laid_out(3, lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    ],
    "transposed with its state": [transposed(0)],
    "transposed with its state, twice": 2 * [transposed(0)],
    "at another place in memory": [
        lambda run: [laid_out(i, torch.clone)(run) for i in range(len(SHAPES))]
    ],
    "a slice of a larger tensor": [laid_out(0, lambda t: torch.cat([t, t])[8:])],
    "all parameters in one flat tensor": [
        lambda run: [
            setattr(p, "data", part.view_as(p))
            for p, part in zip(
                run.params,
                torch.cat([p.flatten() for p in run.params]).split([p.numel() for p in run.params]),
                strict=True,
            )
        ]
    ],
}


@every_kind
@pytest.mark.parametrize("way", LAYOUTS)
def test_a_layout_changes(make, way):
    compare(make, *LAYOUTS[way])


@every_kind
def test_a_layout_changes_in_another_run_and_the_update_is_the_same(make):
    """Not only as SGD's: the very same bits, since every element is added up alike."""
    plain, other = Run(make), Run(make)
    for step in range(4):
        to_format([torch.channels_last, torch.contiguous_format][step % 2])(other)
        for run in (plain, other):
            run.step()
        for param, twin in zip(plain.params, other.params, strict=True):
            assert torch.equal(param, twin)
            assert torch.equal(plain.momentum(param), other.momentum(twin))


# ------------------------------------------------------------------------------ frozen and unfrozen


def freeze(*indices, on=True):
    return lambda run: [run.params[i].requires_grad_(not on) for i in indices]


def unfreeze(*indices):
    return freeze(*indices, on=False)


FROZEN = {
    "the first": [freeze(0)],
    "the last": [freeze(5)],
    "one in the middle, and back": [freeze(2), unfreeze(2)],
    "a whole group, and back": [freeze(2, 3), unfreeze(2, 3)],
    "all but one, and back": [freeze(0, 1, 2, 3, 4), unfreeze(0, 1, 2, 3, 4)],
    "one after the other": [freeze(0), freeze(1), freeze(2), freeze(3), freeze(4)],
    "by turns": [freeze(0), lambda run: (unfreeze(0)(run), freeze(1)(run)), unfreeze(1)],
    "all, and back": [freeze(*range(6)), unfreeze(*range(6))],
    "twice": 2 * [freeze(4), unfreeze(4)],
    "frozen and unfrozen between two steps": [lambda run: (freeze(3)(run), unfreeze(3)(run))],
    "frozen and converted": [
        freeze(0), converted(torch.bfloat16, [0]), converted(torch.float32, [0]), unfreeze(0)
    ],
    "frozen and moved to another group": [
        freeze(0),
        lambda run: run.groups[1]["params"].append(run.groups[0]["params"].pop(0)),
        unfreeze(0),
    ],
    "frozen and replaced": [freeze(0), replace(0, grown)],
    "frozen, and its state cleared": [freeze(0), lambda run: run.state.pop(run.params[0])],
}  # fmt: skip


@optimizers("GMC", "GMC-overlap", "DGC", "LocalUpdates")
@pytest.mark.parametrize("way", FROZEN)
def test_layers_are_frozen_and_unfrozen_between_steps(make, way):
    compare(make, *FROZEN[way])


@optimizers("GMC", "GMC-overlap", "DGC", "LocalUpdates")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_layer_frozen_from_the_start_is_unfrozen(make, steps):
    """After some steps, and before the first one."""
    layer = functools.partial(Parameter, requires_grad=False)
    runs = pair(make, frozen=lambda: [layer(torch.ones(7, 2)), layer(torch.ones(3))])
    go_on(runs, steps)
    for run in runs:
        for param in run.groups[1]["params"][2:]:
            run.params.append(param.requires_grad_())
    go_on(runs, 3)


@every_kind
def test_a_frozen_parameter_is_not_touched(make):
    run = Run(make)
    run.step()
    for i in (0, 3, 4):
        freeze(i)(run)
        before = run.snapshot()[i]
        for _ in range(2):
            run.step()
        assert all(map(torch.equal, run.snapshot()[i], before))


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_frozen_parameter_has_not_sent_yet_waits_for_it(make, overlap):
    """It is kept while it is frozen, sent afterwards, and seen in the public state all the time."""
    run = Run(functools.partial(make, density=0.2, overlap=overlap, bucket_cap_mb=CAP))
    run.step()
    kept = run.memory(run.params[0]).clone()
    assert kept.any()
    freeze(0)(run)
    for _ in range(2):
        run.step()
        assert torch.equal(run.memory(run.params[0]), kept)
    unfreeze(0)(run)
    for _ in range(3):
        run.step()
    assert not torch.equal(run.memory(run.params[0]), kept)


# A frozen parameter may be anything at all: buffers of quantised layers, adapters, placeholders.
ODD = {
    "uint8": lambda: torch.arange(4, dtype=torch.uint8),
    "int64": lambda: torch.arange(4),
    "bool": lambda: torch.tensor([True, False]),
    "float64": lambda: torch.ones(4, dtype=torch.float64),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "on another device": lambda: torch.ones(4, device="meta"),
    "expanded": lambda: torch.ones(1).expand(4),
    "with gaps": lambda: torch.ones(4, 6)[:, ::2],
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse by rows": lambda: torch.eye(4).to_sparse_csr(),
    "of no elements": lambda: torch.ones(0, 3),
    "a number": lambda: torch.tensor(1.0),
}


def odd(kind):
    return Parameter(ODD[kind](), requires_grad=False)


def assert_is_as_made(param, kind):
    if param.device.type != "meta":
        values = [t.to_dense() if "sparse" in kind else t for t in (param.detach(), ODD[kind]())]
        torch.testing.assert_close(*values, rtol=0, atol=0)


@optimizers("GMC", "GMC-overlap", "DGC", "LocalUpdates")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_frozen_parameters_of_any_kind_are_left_alone(make, kind):
    runs = run, _ = pair(make, frozen=lambda: [odd(kind)])
    go_on(runs, 2)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    go_on(runs)
    param = run.groups[1]["params"][2]
    assert not run.state.get(param), "state for a parameter that is never trained"
    assert_is_as_made(param, kind)


@every_kind
@pytest.mark.parametrize("kind", ["float64", "on another device", "sparse", "uint8", "expanded"])
def test_frozen_parameters_of_any_kind_come_later(make, kind):
    """In a group that is added, and put into a group by hand."""
    runs = pair(make)
    for each in runs:
        each.step()
        each.optimizer.add_param_group({"params": [odd(kind)], "lr": 0.1})
        each.groups[0]["params"].append(odd(kind))
    go_on(runs, 2)


@every_kind
@pytest.mark.parametrize(
    "kind", ["float64", "complex", "on another device", "expanded", "with gaps", "sparse"]
)
def test_a_parameter_that_cannot_be_trained_is_refused_once_it_is_unfrozen(make, kind):
    runs = run, _ = pair(make, frozen=lambda: [odd(kind)])
    go_on(runs)
    param = run.groups[1]["params"][2]
    for _ in range(2):
        param.requires_grad_(True)
        param.grad = param.detach().clone()
        assert_refused(run, "parameter 2 .*of group 1|devices? .*meta")
        assert_is_as_made(param, kind)
        param.requires_grad_(False)
        go_on(runs, 2)


# ------------------------------------------------------------------------------------- param_groups


def move(i, target, position=None):
    """Parameter i goes to another group, whose options it then has."""

    def change(run):
        param = run.params[i]
        for group in run.groups:
            group["params"] = [p for p in group["params"] if p is not param]
        params = run.groups[target]["params"]
        params.insert(len(params) if position is None else position, param)

    return change


def remove(i, state="dropped"):
    """Taken from its group, and not to be moved any more."""

    def change(run):
        param = run.params.pop(i)
        for group in run.groups:
            group["params"] = [p for p in group["params"] if p is not param]
        if state == "dropped":
            run.state.pop(param, None)
        run.gone.append((param, param.detach().clone()))

    return change


def bring_back(target):
    def change(run):
        param, _ = run.gone.pop()
        run.groups[target]["params"].append(param)
        run.params.append(param)

    return change


def append(shape, target, values=1.0):
    """A new parameter in an old group, without add_param_group()."""

    def change(run):
        run.params.append(Parameter(torch.full(shape, values)))
        run.groups[target]["params"].append(run.params[-1])

    return change


def add_group(**options):
    def change(run):
        run.params.append(Parameter(torch.ones(3, 2)))
        run.optimizer.add_param_group({"params": [run.params[-1]], **options})

    return change


def pop_group(g, state="dropped"):
    def change(run):
        for param in run.groups.pop(g)["params"]:
            if state == "dropped":
                run.state.pop(param, None)
            run.params = [p for p in run.params if p is not param]
            run.gone.append((param, param.detach().clone()))

    return change


def merge(target, source):
    def change(run):
        run.groups[target]["params"].extend(run.groups[source]["params"])
        del run.groups[source]

    return change


def split(run):
    """A group of two parameters becomes two groups."""
    first = run.groups[0]
    run.groups.append({**first, "params": [first["params"].pop()], "lr": 3 * first["lr"]})


def exchange_options(run):
    first, second = run.groups[:2]
    for key in ("lr", "momentum", "weight_decay"):
        first[key], second[key] = second[key], first[key]


def regroup_from_nothing(run):
    """Every group goes, and the parameters come back in one."""
    options = {k: v for k, v in run.groups[0].items() if k != "params"}
    run.groups.clear()
    run.optimizer.add_param_group({"params": list(run.params), **options})


def set_groups(groups_from):
    return lambda run: setattr(run.optimizer, "param_groups", groups_from(run.groups))


GROUPS = {
    "other order": [set_groups(lambda groups: groups[::-1])],
    "other order in place": [lambda run: run.groups.reverse()],
    "sorted by lr, and back": [
        lambda run: run.groups.sort(key=lambda g: g["lr"]),
        lambda run: run.groups.sort(key=lambda g: -g["lr"]),
    ],
    "rotated three times": 3 * [lambda run: run.groups.append(run.groups.pop(0))],
    "parameters in other order": [lambda run: [g["params"].reverse() for g in run.groups]],
    "first group popped": [pop_group(0)],
    "last group popped": [pop_group(2)],
    "two groups popped": [pop_group(1), pop_group(0)],
    "a group popped, its state left": [pop_group(1, state="left")],
    "merged": [merge(0, 1)],
    "merged backwards": [merge(2, 0)],
    "all merged": [merge(0, 1), merge(0, 1)],
    "merged, then split": [merge(0, 1), split],
    "split": [split],
    "moved to another group": [move(0, 1)],
    "moved to the front of another group": [move(4, 0, 0)],
    # The parameters of all groups, one after the other, are the same list as before.
    "moved over the border to the next group": [move(2, 0)],
    "moved over the border and back": [move(1, 1, 0), move(1, 0)],
    "moved there and back": [move(0, 2), move(0, 0)],
    "the groups' parameters exchanged": [
        lambda run: (move(0, 1)(run), move(2, 0)(run), move(1, 1)(run), move(3, 0)(run))
    ],
    "a group emptied": [lambda run: (move(0, 1)(run), move(1, 1)(run))],
    "a group emptied and filled": [
        lambda run: (move(0, 1)(run), move(1, 1)(run)), lambda run: (move(4, 0)(run))
    ],
    "removed": [remove(0)],
    "removed from the end": [remove(5)],
    "removed, its state left": [remove(3, state="left")],
    "all of a group removed": [lambda run: (remove(0)(run), remove(0)(run))],
    "removed and brought back with its state": [remove(3, state="left"), bring_back(1)],
    "removed and brought back without": [remove(3), bring_back(1)],
    "removed and brought back elsewhere": [remove(0, state="left"), bring_back(2)],
    "appended": [append((3, 2), 0)],
    "appended to each group": [lambda run: [append((g + 2,), g)(run) for g in range(3)]],
    "appended and removed": [append((3, 2), 0), remove(6)],
    "a group added": [add_group(lr=0.3)],
    "a group added, then popped": [add_group(lr=0.3, momentum=0.7), pop_group(3)],
    "a group popped, then one added": [pop_group(0), add_group(lr=0.3)],
    "an equal copy of a group": [lambda run: run.groups.__setitem__(1, dict(run.groups[1]))],
    "equal copies of all": [
        set_groups(lambda groups: [{**g, "params": list(g["params"])} for g in groups])
    ],
    "a copy with another momentum": [
        lambda run: run.groups.__setitem__(1, {**run.groups[1], "momentum": 0.3})
    ],
    "the list of parameters is a copy": [
        lambda run: run.groups[0].update(params=list(run.groups[0]["params"]))
    ],
    "params in a tuple": [lambda run: run.groups[0].update(params=tuple(run.groups[0]["params"]))],
    "options exchanged": [exchange_options],
    "all groups gone, and one instead": [regroup_from_nothing],
    "a key of the user's own": [lambda run: run.groups[0].update(name="backbone")],
}  # fmt: skip


@every_kind
@pytest.mark.parametrize("way", GROUPS)
def test_param_groups_are_changed_by_hand(make, way):
    compare(make, *GROUPS[way])


@optimizers("LocalUpdates")
@pytest.mark.parametrize(
    "way",
    [way for way in GROUPS if "a group added" not in way and "one added" not in way
     and "all groups gone" not in way],
)  # fmt: skip
def test_param_groups_of_local_updates_are_changed_by_hand(make, way):
    """Without add_param_group(), which it refuses."""
    compare(make, *GROUPS[way])


@optimizers("LocalUpdates")
@pytest.mark.parametrize("way", REPLACED)
def test_a_parameter_of_local_updates_is_replaced(make, way):
    compare(make, *REPLACED[way])


@optimizers("GMC-nesterov", "DGC-nesterov")
@pytest.mark.parametrize(
    "way", ["other order", "merged", "moved there and back", "removed and brought back elsewhere",
            "appended", "options exchanged"]
)  # fmt: skip
def test_nesterov_looks_ahead_with_the_parameters_own_momentum(make, way):
    compare(make, *GROUPS[way])


@every_kind
def test_a_parameter_that_stands_in_two_groups_is_refused_by_name(make):
    """torch.optim.SGD steps twice; one memory cannot serve two groups."""
    runs = run, _ = pair(make)
    go_on(runs)
    run.groups[1]["params"].append(run.params[0])
    assert_refused(run, r"parameter 2 .*of group 1")
    run.groups[1]["params"].pop()
    go_on(runs, 2)


@every_kind
def test_all_parameters_gone_is_no_step_at_all(make):
    run = Run(make)
    run.step()
    before = [p.detach().clone() for p in run.params]
    for group in run.groups:
        group["params"].clear()
    run.step()
    run.groups.clear()
    run.step()
    assert all(map(torch.equal, before, run.params))


@not_overlapped
@pytest.mark.parametrize(
    "way", ["other order", "merged", "moved to another group", "removed", "first group popped",
            "split", "equal copies of all", "options exchanged", "all groups gone, and one instead"]
)  # fmt: skip
def test_param_groups_are_changed_between_the_backward_pass_and_the_step(make, way):
    runs = pair(make)
    for each in runs:
        each.step()
        each.backward()
        for change in GROUPS[way]:
            change(each)
        each.optimizer.step()
        each.optimizer.zero_grad()
    assert_same(*runs)
    go_on(runs)


def gradients(run):
    """Those of the last backward pass, made once more."""
    generator = torch.Generator().manual_seed(run.steps)
    return {p: torch.randn(p.shape, generator=generator) for p in run.params}


# -------------------------------------------------------------------------------------------- state


def each_value(f):
    """Every tensor of the state is replaced."""

    def change(run):
        for held in run.state.values():
            for key, value in list(held.items()):
                held[key] = f(value)

    return change


def in_place(f):
    def change(run):
        for held in run.state.values():
            for value in held.values():
                f(value)

    return change


def each_data(f):
    """The tensors stay and their storage is another: value.data = ..."""
    return in_place(lambda value: setattr(value, "data", f(value.data)))


def emptied_and_filled(run):
    """Away from the device and back, the tensors staying the same."""
    kept = {(p, key): value.clone() for p, s in run.state.items() for key, value in s.items()}
    each_data(lambda data: torch.empty(0))(run)
    for (param, key), value in kept.items():
        run.state[param][key].data = value


def as_loaded(run):
    """Rounded on its way, as a file of half the size would have it."""
    each_value(lambda value: value.bfloat16())(run)
    if not run.ours:
        each_value(torch.Tensor.float)(run)  # SGD would go on in 16 bits


def copied_state(run):
    return {p: {k: v.clone() for k, v in held.items()} for p, held in run.state.items()}


def through_numpy(value):
    return torch.from_numpy(value.numpy().copy())


def zero_through_numpy(value):
    """An array that only shows the values must say so, or what is written to it would be lost."""
    array = value.numpy()
    if array.flags.writeable:
        array.fill(0)
    else:
        value.zero_()


def entries(f):
    """f(state, parameter) for every second parameter."""
    return lambda run: [f(run.state, param) for param in run.params[::2]]


STATE = {
    "cleared": lambda run: run.state.clear(),
    "another defaultdict": lambda run: setattr(run.optimizer, "state", defaultdict(dict)),
    "a defaultdict with the same in it": (
        lambda run: setattr(run.optimizer, "state", defaultdict(dict, run.state))
    ),
    "a defaultdict with copies in it": (
        lambda run: setattr(run.optimizer, "state", defaultdict(dict, copied_state(run)))
    ),
    "updated with copies": lambda run: run.state.update(copied_state(run)),
    "__setstate__": lambda run: run.optimizer.__setstate__({"state": defaultdict(dict)}),
    "an entry popped": entries(lambda state, param: state.pop(param, None)),
    "an entry deleted": entries(lambda state, param: state.__delitem__(param)),
    "an entry cleared": entries(lambda state, param: state[param].clear()),
    "an entry replaced by an empty one": entries(lambda s, param: s.__setitem__(param, {})),
    "an entry without momentum": (
        entries(lambda s, param: [s[param].pop(k, None) for k in ("momentum_buffer", "aggregate")])
    ),
    "replaced by zeros": each_value(torch.zeros_like),
    "replaced by clones": each_value(torch.clone),
    "replaced by halves": each_value(lambda value: value / 2),
    "offloaded and back": each_value(lambda value: value.to("cpu", copy=True)),
    "through numpy": each_value(through_numpy),
    "float64": each_value(torch.Tensor.double),
    "bfloat16": as_loaded,
    "by columns": each_value(lambda v: v.t().contiguous().t() if v.dim() == 2 else v),
    "parts of one tensor": each_value(lambda v: torch.stack([v, v])[1]),
    "zeroed in place": in_place(torch.Tensor.zero_),
    "halved in place": in_place(lambda value: value.mul_(0.5)),
    "zeroed through data": in_place(lambda value: value.data.zero_()),
    "one element zeroed": in_place(lambda value: value[(slice(1),) * value.dim()].zero_()),
    "zeroed through numpy": in_place(zero_through_numpy),
    "zeroed together": (
        lambda run: torch._foreach_zero_([v for s in run.state.values() for v in s.values()])
    ),
    "another storage": each_data(torch.clone),
    "another storage of zeros": each_data(torch.zeros_like),
    "another storage, then zeroed": (
        lambda run: (each_data(torch.clone)(run), in_place(torch.Tensor.zero_)(run))
    ),
    "emptied and filled": emptied_and_filled,
    "torch's state_dict, its values zeroed": (
        lambda run: in_place(torch.Tensor.zero_)(run) or run.optimizer.load_state_dict(
            run.optimizer.state_dict()
        )
    ),
}  # fmt: skip
state_kinds = optimizers("GMC", "GMC-overlap", "GMC-iterate", "DGC")
state_ways = pytest.mark.parametrize("way", STATE)


@state_kinds
@state_ways
def test_state_is_changed_by_hand(make, way):
    compare(make, STATE[way])


@state_kinds
@pytest.mark.parametrize("way", ["cleared", "offloaded and back", "zeroed in place"])
def test_state_is_changed_again_and_again(make, way):
    compare(make, *3 * [STATE[way]])


@not_overlapped
@state_ways
def test_state_is_changed_between_the_backward_pass_and_the_step(make, way):
    runs = pair(make)
    for each in runs:
        each.step()
        each.backward()
        with torch.no_grad():
            STATE[way](each)
        each.optimizer.step()
        each.optimizer.zero_grad()
    assert_same(*runs)
    go_on(runs)


@state_kinds
def test_the_momentum_in_the_state_is_sgds_at_any_time(make):
    """Whether the tensor was fetched before the step or after it, or never."""
    runs = run, _ = pair(make)
    for step in range(5):
        for each in runs:
            each.step({step % 3})
        if step % 2:
            assert_same(*runs)
    held = [dict(run.state[p]) for p in run.params]
    assert all(len(entry) == 2 and "memory" in entry for entry in held)
    each_value(lambda value: value.to("cpu", copy=True))(run)
    assert_same(*runs)
    go_on(runs)


@state_kinds
def test_a_tensor_taken_from_the_state_is_not_lost_by_a_later_change(make):
    """Clones of the state, kept for later, go back into it, and it goes on from there."""
    runs = pair(make)
    for each in runs:
        each.step()
        kept = copied_state(each)
        each.step()
        for param, held in kept.items():
            each.state[param].update(held)
    assert_same(*runs)
    go_on(runs)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "way", ["cleared", "another defaultdict", "__setstate__", "replaced by zeros",
            "zeroed in place", "zeroed together", "another storage of zeros"]
)  # fmt: skip
def test_after_a_reset_nothing_is_left_to_be_sent(make, overlap, way):
    """Below density 1, where memory is full of what waits."""
    options = {"overlap": overlap, "bucket_cap_mb": CAP}
    run = Run(functools.partial(make, density=0.1, **options))
    for _ in range(3):
        run.step()
    assert any(run.memory(p).any() for p in run.params)
    with torch.no_grad():
        STATE[way](run)
    for group in run.groups:
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in run.params]
    for _ in range(3):
        sum((p * 0).sum() for p in run.params).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert all(map(torch.equal, before, run.params))
    run.step()
    assert any(run.memory(p).any() for p in run.params)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "way", ["offloaded and back", "replaced by clones", "another storage", "emptied and filled",
            "a defaultdict with the same in it", "a defaultdict with copies in it", "float64",
            "through numpy", "parts of one tensor"]
)  # fmt: skip
def test_what_only_moves_the_state_changes_no_bit(make, overlap, way):
    options = {"density": 0.1, "overlap": overlap, "bucket_cap_mb": CAP}
    runs = run, twin = [Run(functools.partial(make, **options)) for _ in range(2)]
    for _ in range(3):
        for each in runs:
            each.step()
        with torch.no_grad():
            STATE[way](run)
        for p, q in zip(run.params, twin.params, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(run.momentum(p).float(), twin.momentum(q))
            assert torch.equal(run.memory(p).float(), twin.memory(q))


@not_overlapped
def test_memory_written_by_hand_is_what_is_sent(make):
    """The public state is the truth: what a user puts into memory arrives, once."""
    run = Run(functools.partial(make, momentum=0.0))
    for group in run.groups:
        group.update(momentum=0.0, weight_decay=0.0, maximize=False, lr=1.0)
    run.step()
    before = [p.detach().clone() for p in run.params]
    for i, param in enumerate(run.params):
        run.state[param]["memory"] = torch.full_like(param, i + 1.0).detach()
    for _ in range(2):
        sum((p * 0).sum() for p in run.params).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    for i, (param, old) in enumerate(zip(run.params, before, strict=True)):
        torch.testing.assert_close(param.detach(), old - (i + 1.0))


CLEAR = {
    "zero_": lambda state: state.zero_(),
    "all": lambda state: state.__setitem__(slice(None), 0.0),
    "data": lambda state: state.data.zero_(),
    "other data": lambda state: setattr(state, "data", torch.zeros(state.shape)),
    "detach": lambda state: state.detach().zero_(),
    "view": lambda state: state.view(-1).zero_(),
    "part": lambda state: state[: len(state)].zero_(),
    "one by one": lambda state: [state.__setitem__(i, 0.0) for i in range(len(state))],
    "numpy": lambda state: state.numpy().fill(0.0),
    "dlpack": lambda state: torch.from_dlpack(state).zero_(),
    "apply_": lambda state: state.apply_(lambda value: 0.0),
}


@pytest.mark.parametrize("key", ["memory", "momentum_buffer"])
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("how", CLEAR)
def test_state_of_one_parameter_is_cleared_in_any_way(how, make, key):
    """Also that of a parameter in the middle of its bucket; the others keep theirs."""
    runs = []
    for clear in (CLEAR[how], CLEAR["zero_"]):
        params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(3)]
        options = {"momentum_masking": False} if make is gmc_cuda.DGC else {}
        optimizer = make(params, lr=1.0, density=0.1, **options)
        torch.manual_seed(1)
        for step in range(4):
            for param in params:
                param.grad = torch.randn(40)
            if step == 2:
                clear(optimizer.state[params[1]][key])
                assert not optimizer.state[params[1]][key].any()
                assert not optimizer.state_dict()["state"][1][key].any()
                assert optimizer.state[params[0]][key].any()
            optimizer.step()
        runs.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*runs)


def test_what_reads_the_storage_of_lazy_state_is_served_or_refused():
    param = torch.nn.Parameter(torch.zeros(40))
    optimizer = gmc_cuda.GMC([param], lr=1.0, density=0.1)
    param.grad = torch.randn(40)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    assert momentum.tolist() == momentum.clone().tolist()
    with pytest.raises(RuntimeError, match="share a clone"):
        momentum.share_memory_()


@state_kinds
@pytest.mark.parametrize("key", ["memory", "momentum_buffer"])
@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(8, 3, dtype=torch.complex64)], ids=["shape", "complex"]
)
def test_state_that_does_not_fit_is_refused_by_name(make, key, value):
    runs = run, _ = pair(make)
    go_on(runs)
    if make.keywords.get("momentum_form") == "iterate" and key == "momentum_buffer":
        key = "aggregate"
    before = run.state[run.params[0]][key].clone()
    values = [p.detach().clone() for p in run.params]
    run.state[run.params[0]][key] = value
    with pytest.raises((TypeError, ValueError), match=f"{key}.*parameter 0 .*of group 0"):
        run.backward()
        run.optimizer.step()
    assert all(map(torch.equal, run.params, values))
    run.state[run.params[0]][key] = before
    run.optimizer.zero_grad()
    run.steps -= 1
    go_on(runs, 2)


# ------------------------------------------------------------------------------------------- copies


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}
# What the copy is made after; with no step in between, so that nothing has been put in order yet.
BEFORE_A_COPY = {
    "nothing": [],
    "frozen": [freeze(0)],
    "replaced": REPLACED["shrunk"],
    "rounded": REPLACED["rounded"],
    "converted": [converted(torch.bfloat16)],
    "channels_last": LAYOUTS["channels_last"],
    "other order": GROUPS["other order"],
    "merged": GROUPS["merged"],
    "moved": GROUPS["moved to another group"],
    "removed": GROUPS["removed"],
    "appended": GROUPS["appended"],
    "cleared": [STATE["cleared"]],
    "zeroed in place": [STATE["zeroed in place"]],
    "offloaded": [STATE["offloaded and back"]],
    "another storage": [STATE["another storage"]],
    "an entry popped": [STATE["an entry popped"]],
    "an entry cleared": [STATE["an entry cleared"]],
    "an entry without momentum": [STATE["an entry without momentum"]],
}


def copied(run, way):
    twin = copy.copy(run)
    twin.optimizer, twin.params = COPIES[way]((run.optimizer, run.params))
    twin.gone = []
    return twin


@pytest.mark.parametrize(
    "make,way", [(KINDS["GMC"], "deepcopy"), (KINDS["GMC-overlap"], "pickle"),
                 (KINDS["DGC"], "torch.save")], ids=["GMC", "GMC-overlap", "DGC"]
)  # fmt: skip
@pytest.mark.parametrize("change", BEFORE_A_COPY)
def test_a_copy_in_the_middle_of_a_change_goes_on_as_sgds_does(make, way, change):
    runs = pair(make)
    go_on(runs)
    for each in runs:
        with torch.no_grad():
            for do in BEFORE_A_COPY[change]:
                do(each)
    twins = [copied(each, way) for each in runs]
    assert_same(*twins)
    go_on(twins, 2)
    go_on(runs, 2)  # the originals are undisturbed


@every_kind
@pytest.mark.parametrize(
    "change", [c for c in BEFORE_A_COPY if c not in ("appended", "rounded", "converted")]
)
def test_a_state_dict_in_the_middle_of_a_change_is_the_state_of_sgd(make, change):
    """Loaded into an optimizer over the same parameters, and into this one itself."""
    runs = pair(make)
    for each in runs:
        each.step()
        with torch.no_grad():
            for do in BEFORE_A_COPY[change]:
                do(each)
        saved = through_torch_save(each.optimizer.state_dict())
        each.step()
        each.optimizer.load_state_dict(saved)
    assert_same(*runs)
    go_on(runs)


@every_kind
def test_a_copy_of_a_copy_and_the_dropped_original(make, collect_garbage):
    runs = pair(make)
    for way in COPIES:
        for each in runs:
            each.step()
        runs = [copied(each, way) for each in runs]
        collect_garbage()
        assert_same(*runs)
    go_on(runs)


def rounds(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [0, 3, 4], ids=["unused", "between rounds", "in a round"])
def test_a_copy_of_local_updates_goes_on_bit_by_bit(way, inner, steps):
    params = [p.detach().clone().requires_grad_() for p in Run(torch.optim.SGD).params]
    optimizer = gmc_cuda.LocalUpdates(inner(params, lr=0.1), every=3)
    rounds(optimizer, params, range(steps))
    twin, twins = COPIES[way]((optimizer, params))
    assert twin.every == 3
    assert type(twin.inner) is inner
    rounds(twin, twins, range(steps, steps + 7))
    assert not any(map(torch.equal, params, twins)), "the copy trains the original's parameters"
    rounds(optimizer, params, range(steps, steps + 7))
    assert all(map(torch.equal, params, twins))
    assert twin.stats() == optimizer.stats()


# ------------------------------------------------------------------------- options that are refused


REFUSED = [
    ("lr", -1.0, 0),
    ("lr", -1.0, 2),
    ("lr", "0.1", 2),
    ("lr", float("nan"), 1),
    ("lr", torch.ones(2), 1),
    ("momentum", 1.0, 0),
    ("momentum", 1.0, 2),
    ("momentum", -0.5, 1),
    ("density", 0.0, 2),
    ("density", 7, 0),
    ("weight_decay", -1.0, 1),
]
refused = pytest.mark.parametrize("key,value,g", REFUSED)


@not_overlapped
@refused
def test_a_refused_option_loses_no_gradient(make, key, value, g):
    """Once it is mended the very same step is made, as though it had been so from the start."""
    runs = run, _ = pair(make)
    go_on(runs)
    for each in runs:
        each.backward()
    before, snapshot = run.groups[g][key], run.snapshot()
    for _ in range(2):
        run.groups[g][key] = value
        with pytest.raises((TypeError, ValueError), match=f"{key} of param group {g}"):
            run.optimizer.step()
        assert_unchanged(run, snapshot)
    run.groups[g][key] = before
    for each in runs:
        each.optimizer.step()
        each.optimizer.zero_grad()
    assert_same(*runs)
    go_on(runs)


@every_kind
@pytest.mark.parametrize("value", [torch.tensor(1), torch.tensor([1]), torch.tensor(1).short()])
def test_an_integer_tensor_is_a_learning_rate(make, value):
    """torch.optim.SGD takes it for the number it holds."""
    compare(make, lambda run: run.groups[1].update(lr=value if run.ours else 1.0))
    compare(make, lambda run: run.groups[1].update(lr=value if run.ours else 1.0),
            lambda run: run.groups[1].update(lr=0.1))  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
def test_one_step_with_an_integer_learning_rate_keeps_the_sum(overlap):
    """What came in is what has moved, with nothing lost in the step of another kind of number."""
    weight = Parameter(torch.zeros(8))
    optimizer = gmc_cuda.GMC([weight], lr=1.0, momentum=0.0, density=0.25, overlap=overlap)
    total = torch.zeros(8)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = torch.tensor(1) if step in (1, 2) else 1.0
        gradient = torch.arange(1.0, 9.0) * 2.0**step
        total += gradient
        (weight * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(optimizer.state[weight]["memory"] - weight.detach(), total)


@overlapped
@refused
def test_an_option_refused_before_the_backward_pass_sends_nothing(make, key, value, g):
    """Whether the backward pass or the step refuses it: after zero_grad() all is as it was."""
    runs = run, _ = pair(make)
    go_on(runs)
    before, run.groups[g][key] = run.groups[g][key], value
    assert_refused(run, f"{key} of param group {g}")
    run.groups[g][key] = before
    go_on(runs, 2)


@overlapped
@pytest.mark.parametrize("value", [-1.0, "0.1", float("nan"), torch.ones(2)])
def test_gradients_of_a_step_refused_after_they_were_sent_come_with_the_next(make, value):
    """At density 1: the next step is SGD's with the sum of both gradients."""
    runs = run, sgd = pair(make)
    for group in (*run.groups, *sgd.groups):
        group["weight_decay"] = 0.0  # of one step or of two: that is not what is asked here
        if make is KINDS["DGC-overlap"]:  # its local momentum has moved on with the refused step
            group["momentum"] = 0.0
    for each in runs:
        each.step()
    before = run.groups[2]["lr"]
    run.backward()
    run.groups[2]["lr"] = value
    values = [p.detach().clone() for p in run.params]
    with pytest.raises((TypeError, ValueError), match="lr of param group 2"):
        run.optimizer.step()
    assert all(map(torch.equal, run.params, values))
    run.groups[2]["lr"] = before
    run.optimizer.zero_grad()
    sgd.backward()
    for _ in range(2):
        for each in runs:
            each.step()
        for i, params in enumerate(zip(run.params, sgd.params, strict=True)):
            assert_close(*params, f"parameter {i}", rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------- overlap begins, fails and ends


def sparse_run(make=gmc_cuda.GMC, **options):
    """At density 0.1 in several buckets, with one set of options for all: for the mass equation."""
    run = Run(functools.partial(make, density=0.1, bucket_cap_mb=CAP, **options))
    for group in run.groups:
        group.update(maximize=False, momentum=0.5)
    return run


def option_of(run, param, key):
    return next(g[key] for g in run.groups if any(p is param for p in g["params"]))


def pending(run):
    """What the next step starts from: what waits, and the momentum that will be added."""
    return {
        p: run.memory(p).double()
        + option_of(run, p, "momentum") * run.momentum(p).double()
        for p in run.params
    }  # fmt: skip


def decay(run):
    return {p: option_of(run, p, "weight_decay") * p.detach().double() for p in run.params}


def add(*parts):
    return {p: sum(part[p] for part in parts) for p in parts[0]}


def assert_mass(run, came_in, values):
    """memory + a is all that came in, and parameters moved by lr * a."""
    for i, param in enumerate(run.params):
        aggregate = run.momentum(param).double()
        torch.testing.assert_close(
            run.memory(param).double() + aggregate, came_in[param], rtol=0, atol=1e-5,
            msg=lambda text, i=i: f"parameter {i}: {text}",
        )  # fmt: skip
        moved = (values[param] - param.detach().double()) / option_of(run, param, "lr")
        torch.testing.assert_close(moved, aggregate, rtol=0, atol=2e-5)


def values_of(run):
    return {p: p.detach().double().clone() for p in run.params}


@pytest.mark.parametrize("overlap", [False, True])
def test_the_mass_equation_can_be_read_off_the_public_state(overlap):
    run = sparse_run(overlap=overlap)
    for _ in range(5):
        came_in, values = add(pending(run), decay(run)), values_of(run)
        run.step()
        assert_mass(run, add(came_in, gradients(run)), values)


def undecayed(**options):
    run = sparse_run(**options)
    for group in run.groups:
        group["weight_decay"] = 0.0
    for _ in range(2):
        run.step()
    return run


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("value", [-1.0, "0.1"])
def test_refused_after_the_backward_pass_keeps_the_mass(value, times):
    """overlap=True: gradients that were sent return to memory and come with a later step."""
    run = undecayed(overlap=True)
    came_in, values, lr = pending(run), values_of(run), run.groups[1]["lr"]
    for _ in range(times):
        run.groups[1]["lr"] = lr
        run.backward()
        came_in = add(came_in, gradients(run))
        run.groups[1]["lr"] = value
        with pytest.raises((TypeError, ValueError), match="lr of param group 1"):
            run.optimizer.step()
        run.optimizer.zero_grad()
        for param, left in pending(run).items():
            torch.testing.assert_close(left, came_in[param], rtol=0, atol=1e-5)
    run.groups[1]["lr"] = lr
    run.step()
    assert_mass(run, add(came_in, gradients(run)), values)


@pytest.mark.parametrize("overlap", [False, True])
def test_refused_before_the_backward_pass_keeps_the_mass(overlap):
    """The gradients that zero_grad() drops are the user's to drop; nothing else is lost."""
    run = undecayed(overlap=overlap)
    came_in, values = pending(run), values_of(run)
    for key, value in (("momentum", 1.0), ("density", 0.0), ("lr", -1.0)):
        before, run.groups[2][key] = run.groups[2][key], value
        with pytest.raises((TypeError, ValueError), match=f"{key} of param group 2"):
            run.backward()
            run.optimizer.step()
        run.groups[2][key] = before
        run.optimizer.zero_grad()
        for param, left in pending(run).items():
            torch.testing.assert_close(left, came_in[param], rtol=0, atol=1e-5)
    run.step()
    assert_mass(run, add(came_in, gradients(run)), values)


class Broken(Exception):
    pass


def broken_backward(run, order):
    """A backward pass in the given order of parameters that ends by an exception half-way.

    Returns the parameters whose gradients were ready by then.
    """
    run.steps += 1
    gradient = gradients(run)
    ready = []

    def stop(_):
        raise Broken

    # A chain: the gradient of a later link is there before that of an earlier one.
    loss = torch.zeros((), requires_grad=True)
    half = len(order) // 2
    for n, i in enumerate(reversed(order)):
        param = run.params[i]
        if n == half:
            loss = loss * 1
            loss.register_hook(stop)
        if n >= half:
            ready.append(param)
        loss = loss + (param * gradient[param]).sum()
    with pytest.raises(Broken):
        loss.backward()
    return ready


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 3, 1]])
@pytest.mark.parametrize("times", [1, 2])
def test_an_exception_in_the_backward_pass_keeps_the_mass(order, times):
    """Gradients that were sent by then come with the next step; the others are the user's."""
    run = undecayed(overlap=True)
    came_in, values = pending(run), values_of(run)
    maybe = {p: [torch.zeros_like(p)] for p in run.params}
    for _ in range(times):
        ready = broken_backward(run, order)
        gradient = gradients(run)
        for param in ready:  # sent, with its bucket, or dropped by zero_grad()
            maybe[param] = maybe[param] + [s + gradient[param] for s in maybe[param]]
        run.optimizer.zero_grad()
    run.step()
    last = gradients(run)
    for param in run.params:
        aggregate, memory = run.momentum(param).double(), run.memory(param).double()
        arrived = memory + aggregate - came_in[param] - last[param]
        assert any(torch.allclose(arrived, s.double(), rtol=0, atol=2e-5) for s in maybe[param])
        moved = (values[param] - param.detach().double()) / option_of(run, param, "lr")
        torch.testing.assert_close(moved, aggregate, rtol=0, atol=2e-5)
    came_in, values = pending(run), values_of(run)
    run.step()
    assert_mass(run, add(came_in, gradients(run)), values)


def test_an_exception_before_any_gradient_changes_nothing():
    run = undecayed(overlap=True)
    snapshot, came_in, values = run.snapshot(), pending(run), values_of(run)

    def stop(_):
        raise Broken

    loss = sum((p * g).sum() for p, g in gradients(run).items())
    loss.register_hook(stop)
    with pytest.raises(Broken):
        loss.backward()
    assert_unchanged(run, snapshot)
    run.step()
    assert_mass(run, add(came_in, gradients(run)), values)


@every_kind
def test_an_exception_in_the_backward_pass_at_density_one(make):
    """A batch that failed is left out: with overlap=True up to what had been sent already."""
    runs = run, sgd = pair(make)
    for each in runs:
        each.step()
    broken_backward(run, [5, 4, 3, 2, 1, 0])
    run.optimizer.zero_grad()
    sgd.steps = run.steps
    for each in runs:
        each.step()
    if not run.optimizer.overlap:
        assert_same(*runs)
    for each in runs:
        each.step()
    assert all(p.grad is None for p in run.params)


@overlapped
@pytest.mark.parametrize("moment", ["frozen", "unfrozen"])
def test_a_layer_frozen_between_the_backward_pass_and_the_step(make, moment):
    """Refused or made; what was sent is not lost, and the next step works."""
    run = Run(functools.partial(make, density=0.1))
    if moment == "unfrozen":
        freeze(2)(run)
    run.step()
    run.backward()
    (freeze if moment == "frozen" else unfreeze)(2)(run)
    with contextlib.suppress(RuntimeError):
        run.optimizer.step()
    run.optimizer.zero_grad()
    for _ in range(2):
        before = [p.detach().clone() for p in run.params]
        run.step()
        moved = [not torch.equal(p, old) for p, old in zip(run.params, before, strict=True)]
        assert any(moved)
        assert moved[2] <= run.params[2].requires_grad


def alone(make, steps):
    """Nobody but this optimizer has ever been here."""
    run = Run(make)
    for _ in range(steps):
        run.step()
    return run


def train_on(run, make, state=None):
    """A new optimizer over the run's parameters, as they are grouped."""
    options = ("lr", "momentum", "weight_decay", "maximize")
    groups = [{"params": g["params"], **{k: g[k] for k in options}} for g in run.groups]
    run.optimizer = make(groups, lr=0.1)
    if state is not None:
        run.optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "way", ["other order", "merged", "moved to another group", "split", "equal copies of all",
            "params in a tuple"]
)  # fmt: skip
def test_groups_that_change_while_gradients_are_on_their_way_lose_none_of_them(way):
    """Either the step is made, or it is refused and its gradients come with the next one."""
    run = undecayed(overlap=True)
    for group in run.groups:
        group["lr"] = 0.1  # one for all: which group's applies is not what is asked here
    came_in, values = pending(run), values_of(run)
    run.backward()
    came_in = add(came_in, gradients(run))
    for change in GROUPS[way]:
        change(run)
    for group in run.groups:
        group["lr"] = 0.1
    try:
        run.optimizer.step()
    except RuntimeError:
        for param, left in pending(run).items():
            torch.testing.assert_close(left, came_in[param], rtol=0, atol=1e-5)
    else:
        assert_mass(run, came_in, values)
        came_in, values = pending(run), values_of(run)
    run.optimizer.zero_grad()
    run.step()
    assert_mass(run, add(came_in, gradients(run)), values)


@optimizers("GMC-overlap")
@pytest.mark.parametrize("way", ["deleted", "released", "released twice"])
def test_sgd_takes_over_from_an_overlapped_optimizer(make, way, collect_garbage):
    run, sgd = alone(make, 2), alone(torch.optim.SGD, 2)
    first = run.optimizer
    state = first.sgd_state_dict()
    if way != "deleted":
        first.release()
    if way == "released twice":
        first.release()
    if way == "deleted":
        del first
    train_on(run, torch.optim.SGD, state)
    collect_garbage()
    for _ in range(3):
        for each in (run, sgd):
            each.backward()
        assert all(p.grad is not None for p in run.params), "somebody took the gradients"
        for each in (run, sgd):
            each.optimizer.step()
            each.optimizer.zero_grad()
        for param, twin in zip(run.params, sgd.params, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=2e-6)


@overlapped
@pytest.mark.parametrize("second", ["GMC", "GMC-overlap", "DGC-overlap"])
@pytest.mark.parametrize("way", ["deleted", "released", "in mid-backward", "with a copy alive"])
def test_another_optimizer_takes_over_from_an_overlapped_one(make, second, way, collect_garbage):
    """It trains the parameters just as one that found them like that."""
    run = alone(make, 2)
    twin = Run(KINDS[second])
    with torch.no_grad():
        for param, other in zip(run.params, twin.params, strict=True):
            other.copy_(param)
    twin.steps = run.steps
    if way == "in mid-backward":
        run.backward()
        run.optimizer.zero_grad()
        twin.steps = run.steps
    first = run.optimizer
    kept = copied(run, "deepcopy") if way == "with a copy alive" else None
    if way == "released":
        first.release()
    else:
        del first
    train_on(run, KINDS[second])
    collect_garbage()
    for _ in range(3):
        for each in (run, twin):
            each.step()
        for param, other in zip(run.params, twin.params, strict=True):
            assert torch.equal(param, other)
            assert torch.equal(run.momentum(param), twin.momentum(other))
    if kept is not None:
        kept.step()


@optimizers("GMC", "GMC-overlap", "DGC", "DGC-overlap")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_dropped_optimizer_is_gone(make, steps, collect_garbage):
    """Its hooks do not keep it alive, nor the memory that it holds; parameters live on."""
    run = alone(make, steps)
    ref = weakref.ref(run.optimizer)
    run.optimizer = None
    collect_garbage()
    assert ref() is None
    run.backward()
    assert all(p.grad is not None for p in run.params)


@overlapped
def test_a_parameter_that_was_removed_keeps_its_gradients(make):
    """It has no hook any more that would take them away."""
    run = Run(make)
    run.step()
    remove(0)(run)
    run.step()
    ((old, _),) = run.gone
    run.params.append(old)
    run.backward()
    assert old.grad is not None
    run.optimizer.step()
    assert old.grad is not None
    assert torch.equal(old, run.gone[0][1])


@overlapped
def test_a_parameter_appended_by_hand_is_sent_in_the_backward_pass(make):
    """After one step with it, it is a parameter like the others."""
    run = Run(make)
    append((3, 2), 1)(run)
    run.step()
    run.backward()
    assert all(p.grad is None for p in run.params)
    run.optimizer.step()


@overlapped
def test_gradients_are_sent_in_the_backward_pass_after_a_conversion_too(make, by_data):
    """Swapped parameters leave their hooks behind."""
    run = Run(make)
    run.step()
    for dtype in (torch.bfloat16, torch.float32):
        converted(dtype, None, by_data)(run)
        run.step()
        run.backward()
        assert all(p.grad is None for p in run.params)
        run.optimizer.step()


@not_overlapped
def test_release_is_harmless_without_overlap(make):
    run = Run(make)
    run.step()
    run.optimizer.release()
    run.backward()
    assert all(p.grad is not None for p in run.params)


@overlapped
def test_two_backward_passes_are_refused_and_then_dropped(make):
    """Forgotten no_sync(): the message names it, and after zero_grad() training goes on."""
    run = Run(make)
    run.step()
    run.backward()
    with pytest.raises(RuntimeError, match="no_sync"):
        run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    before = [p.detach().clone() for p in run.params]
    run.step()
    assert not any(map(torch.equal, before, run.params))


@overlapped
def test_reentrant_checkpoints_of_a_shared_layer_work_or_are_named(make):
    """Each is a backward pass of its own, so a shared layer's gradient arrives in two parts."""

    def train(make, checkpointed):
        torch.manual_seed(2)
        layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
        optimizer = make(layers.parameters(), lr=0.1)
        for step in range(3):
            x = layers[0](torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
            for _ in range(3):
                if checkpointed and step == 1:
                    x = checkpoint(lambda y: layers[1](y).tanh(), x, use_reentrant=True)
                else:
                    x = layers[1](x).tanh()
            try:
                layers[2](x).square().mean().backward()
                optimizer.step()
            except RuntimeError as error:
                assert checkpointed
                assert step == 1
                assert "reentrant" in str(error)
                assert "overlap=False" in str(error)
                outcomes.append("refused")
            optimizer.zero_grad()
        return torch.nn.utils.parameters_to_vector(layers.parameters())

    outcomes = []
    parameters = [train(make, checkpointed) for checkpointed in (False, True)]
    assert outcomes or torch.allclose(*parameters, rtol=1e-5, atol=1e-6)
