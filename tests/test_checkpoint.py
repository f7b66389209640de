"""gmc_cuda.checkpoint: every worker's memory, on as many workers and on others."""

import copy
import enum
import os
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import gmc_cuda
from gmc_cuda import checkpoint
from gmc_cuda._engine import snapshot
from gmc_cuda._engine.names import plain_name, plain_names
from support.full_disk import full_disk
from support.problems import aggregate_of, flat, mean, memory_of, same_on_all_ranks, set_gradients


def network():
    torch.manual_seed(2)
    return torch.nn.Sequential(
        torch.nn.Linear(11, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)
    )


def build(group, make=gmc_cuda.GMC, lr=0.1, **options):
    model = network()
    options = {"density": 0.1, "process_group": group, **options}
    optimizer = make(model.parameters(), lr=lr, **options)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def go_on(run, steps, rank):
    model, optimizer, scheduler = run
    for step in steps:
        set_gradients(list(model.parameters()), rank, step)
        optimizer.step()
        scheduler.step()


def save_and_go_on(group, folder, make, options, wait):
    """Returns what a run on any number of workers must start from, and how this one ended."""
    rank = dist.get_rank(group)
    run = model, optimizer, scheduler = build(group, make, **options)
    params = list(model.parameters())
    go_on(run, range(3), rank)
    extra = {"scheduler": scheduler.state_dict(), "step": 3}
    future = checkpoint.save(folder, model, optimizer, extra, wait=wait)
    start = mean(group, memory_of(optimizer, params)), aggregate_of(optimizer, params), flat(params)
    go_on(run, range(3, 6), rank)
    future.result()
    return start, (memory_of(optimizer, params), flat(params))


def load_and_go_on(group, folder, make, options, start, end):
    rank = dist.get_rank(group)
    run = model, optimizer, scheduler = build(group, make, lr=9.0, **options)
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        extra = checkpoint.load(folder, model, optimizer)
    scheduler.load_state_dict(extra["scheduler"])
    assert extra["step"] == 3
    assert optimizer.param_groups[0]["lr"] == 0.05
    unsent, aggregate, weights = start
    torch.testing.assert_close(mean(group, memory_of(optimizer, params)), unsent)
    if make is gmc_cuda.GMC:
        assert torch.equal(aggregate_of(optimizer, params), aggregate)
    assert torch.equal(flat(params), weights)
    go_on(run, range(3, 6), rank)
    if end is not None:
        memory, weights = end[rank]
        assert torch.equal(memory_of(optimizer, params), memory)
        assert torch.equal(flat(params), weights)
    assert same_on_all_ranks(group, params)


@pytest.mark.parametrize("saved_on,loaded_on", [(2, 2), (2, 1), (2, 4), (1, 2), (4, 2), (1, 1)])
@pytest.mark.parametrize(
    "make,options",
    [
        (gmc_cuda.GMC, {}),
        (gmc_cuda.GMC, {"momentum_form": "iterate"}),
        (gmc_cuda.GMC, {"density": 1.0}),
        (gmc_cuda.GMC, {"exchange": "reduce_scatter"}),
        (gmc_cuda.DGC, {}),
        (gmc_cuda.DGC, {"exchange": "reduce_scatter"}),
    ],
)
def test_resuming_keeps_everything(pool, tmp_path, saved_on, loaded_on, make, options):
    """Invariants 8 and 10."""
    folder = str(tmp_path / "run")
    saved = pool.run(saved_on, save_and_go_on, folder, make, options, True)
    start, ends = saved[0][0], [end for _, end in saved]
    ends = ends if saved_on == loaded_on else None
    pool.run(loaded_on, load_and_go_on, folder, make, options, start, ends)


def test_saving_beside_the_training_on_several_workers(pool, tmp_path):
    folder, case = str(tmp_path / "run"), (gmc_cuda.GMC, {})
    saved = pool.run(4, save_and_go_on, folder, *case, False)
    ends = [end for _, end in saved]
    pool.run(4, load_and_go_on, folder, *case, saved[0][0], ends)


def test_without_a_process_group(tmp_path):
    run = model, optimizer, _ = build(None)
    go_on(run, range(3), 0)
    checkpoint.save(tmp_path, model, optimizer)
    twin = build(None)
    assert checkpoint.load(tmp_path, *twin[:2]) is None
    for either in (run, twin):
        go_on((*either[:2], torch.optim.lr_scheduler.ConstantLR(either[1])), range(3, 6), 0)
    assert torch.equal(flat(list(model.parameters())), flat(list(twin[0].parameters())))


def test_saving_while_the_training_goes_on(tmp_path):
    """What is saved is the state at the call, and a second save replaces the first."""
    run = model, optimizer, _ = build(None)
    for first in (0, 3):
        go_on(run, range(first, first + 2), 0)
        expected = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        future = checkpoint.save(tmp_path, model, optimizer, wait=False)
        go_on(run, range(first + 2, first + 3), 0)
        future.result()
        twin = build(None)
        checkpoint.load(tmp_path, *twin[:2])
        assert flat(list(twin[0].state_dict().values())).equal(flat(list(expected[0].values())))
        for i, tensors in expected[1]["state"].items():
            assert torch.equal(tensors["memory"], twin[1].state_dict()["state"][i]["memory"])
    assert len(list(tmp_path.iterdir())) == 3, "two parts, and the file that names the newer one"


def fail_to_save(group, folder):
    """A disk that is full for one worker: all raise, and the checkpoint before is intact."""
    rank = dist.get_rank(group)
    run = model, optimizer, _ = build(group)
    go_on(run, range(2), rank)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    go_on(run, range(2, 4), rank)
    before = memory_of(optimizer, list(model.parameters()))
    with full_disk(100) if rank == 1 else nullcontext():
        with pytest.raises(RuntimeError, match="the checkpoint was not saved; .*worker"):
            checkpoint.save(folder, model, optimizer, {"step": 4})
    assert torch.equal(memory_of(optimizer, list(model.parameters())), before)
    assert checkpoint.load(folder, model, optimizer) == {"step": 2}
    if rank == 0:
        assert len(os.listdir(folder)) == 2


def test_a_full_disk(pool, tmp_path):
    pool.run(2, fail_to_save, str(tmp_path))


def test_wrong_checkpoints_are_refused_and_change_nothing(tmp_path):
    model, optimizer, _ = build(None)
    with pytest.raises(FileNotFoundError, match="there is no complete checkpoint in"):
        checkpoint.load(tmp_path, model, optimizer)
    checkpoint.save(tmp_path, model, optimizer)
    cases = [
        (network(), gmc_cuda.DGC, "got optimizer GMC, must be DGC"),
        (network()[:2], gmc_cuda.GMC, "got one of 6 parameters, must be of 4"),
        (
            network().bfloat16(),
            gmc_cuda.GMC,
            r"0.weight of shape \(7, 11\) and torch.float32, must",
        ),
    ]
    for other, make, words in cases:
        wrong = make(other.parameters(), lr=0.3)
        before = flat(list(other.parameters()))
        with pytest.raises(ValueError, match=words):
            checkpoint.load(tmp_path, other, wrong)
        assert torch.equal(flat(list(other.parameters())), before)
        assert wrong.param_groups[0]["lr"] == 0.3
    with pytest.raises(ValueError, match="parameter 0 of the optimizer is not one of the model's"):
        checkpoint.load(tmp_path, network(), optimizer)


def test_extra_that_could_not_be_loaded_is_refused(tmp_path):
    model, optimizer, scheduler = build(None)
    with pytest.raises(TypeError, match="extra: got an object that torch.load"):
        checkpoint.save(tmp_path, model, optimizer, {"scheduler": scheduler})
    assert not list(tmp_path.iterdir())


class Kind(enum.Enum):
    MATRIX = 1


@pytest.mark.parametrize("value", [max, Kind.MATRIX, np.zeros(2)])
def test_a_group_entry_that_could_not_be_loaded_is_refused(tmp_path, value):
    model, optimizer, _ = build(None)
    checkpoint.save(tmp_path, model, optimizer, {"step": 0})
    before = sorted(tmp_path.iterdir())
    optimizer.param_groups[0]["kind"] = value
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['kind'\]: got an object that"):
        checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    assert sorted(tmp_path.iterdir()) == before
    assert checkpoint.load(tmp_path, model, optimizer) == {"step": 0}


def refused_group_entry(group, folder):
    model, optimizer, _ = build(group)
    optimizer.param_groups[0]["kind"] = max
    with pytest.raises(TypeError, match="got an object that torch.load"):
        checkpoint.save(folder, model, optimizer)
    assert not os.path.exists(folder) or not os.listdir(folder)


def test_all_workers_refuse_a_group_entry(pool, tmp_path):
    pool.run(2, refused_group_entry, str(tmp_path / "checkpoint"))


def save_with_entries(group, folder, wait):
    """Each worker has entries of its own, also for a frozen parameter."""
    model, optimizer, _ = run = build(group)
    params = list(model.parameters())
    params[0].requires_grad_(False)
    go_on(run, range(2), dist.get_rank(group))
    for p in params[:2]:
        optimizer.state[p]["ema"] = torch.full((2, 2), 1.0 + dist.get_rank(group))[:1]
        optimizer.state[p]["seen"] = {"steps": 2}
    saved = checkpoint.save(folder, model, optimizer, wait=wait)
    for p in params[:2]:
        optimizer.state[p]["ema"].zero_()
    saved.result()
    optimizer.state[params[1]]["ema"] = max
    with pytest.raises(TypeError, match=r"optimizer.state\[1\]\['ema'\]: got an object that"):
        checkpoint.save(folder, model, optimizer)


def load_with_entries(group, folder):
    model, optimizer, _ = build(group)
    params = list(model.parameters())
    params[0].requires_grad_(False)
    checkpoint.load(folder, model, optimizer)
    assert [set(optimizer.state[p]) & {"ema", "seen"} for p in params[1:]] == [
        {"ema", "seen"}, *[set()] * (len(params) - 2)
    ]  # fmt: skip
    assert all(optimizer.state[p]["seen"] == {"steps": 2} for p in params[:2])
    set_gradients(params[1:], dist.get_rank(group), 2)
    optimizer.step()
    return [optimizer.state[p]["ema"].tolist() for p in params[:2]]


@pytest.mark.parametrize("wait", [True, False])
def test_entries_of_the_user_are_kept(pool, tmp_path, wait):
    pool.run(2, save_with_entries, str(tmp_path), wait)
    found = pool.run(2, load_with_entries, str(tmp_path))
    assert found == [[[[1.0, 1.0]]] * 2, [[[2.0, 2.0]]] * 2]
    assert pool.run(4, load_with_entries, str(tmp_path)) == [found[0]] * 4


def test_other_optimizers_are_refused_with_the_line_to_write(tmp_path):
    model = network()
    inner = torch.optim.AdamW(model.parameters())
    for optimizer in (inner, gmc_cuda.LocalUpdates(inner)):
        for call in (checkpoint.save, checkpoint.load):
            with pytest.raises(TypeError) as error:
                call(tmp_path, model, optimizer)
            assert str(error.value) == (
                f"optimizer: got a {type(optimizer).__name__}, must be a GMC or DGC. Let each "
                "worker save and load its own state:\n"
                "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
            )


# ------------------------------------------------------------------------------- names and wrappers


class Inner(torch.nn.Module):
    """A user's submodule that is called "module"."""

    def __init__(self, clash):
        super().__init__()
        self.module = torch.nn.Linear(5, 4)
        if clash:
            self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.module(x)


def wrapped(kind, seed, clash=False):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), Inner(clash))
    wrap = partial(torch.compile, backend="eager")
    if kind == "compiled":
        model = wrap(model)
    elif kind == "a compiled layer":
        model[2] = wrap(model[2])
    elif kind == "activation checkpointing":
        model[0], model[2] = checkpoint_wrapper(model[0]), checkpoint_wrapper(model[2])
    elif kind == "a compiled layer with activation checkpointing":
        model[2] = checkpoint_wrapper(wrap(model[2]))
    elif kind == "DataParallel":
        model = torch.nn.DataParallel(model)
    elif kind == "compiled DataParallel":
        model = wrap(torch.nn.DataParallel(wrap(model)))
    return model, gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)


KINDS = [
    "plain",
    "compiled",
    "a compiled layer",
    "activation checkpointing",
    "a compiled layer with activation checkpointing",
    "DataParallel",
    "compiled DataParallel",
]


@pytest.mark.parametrize("clash", [False, True])
@pytest.mark.parametrize("saved_as", KINDS)
def test_wrappers_may_differ_between_saving_and_loading(tmp_path, saved_as, clash):
    model, optimizer = wrapped(saved_as, 0, clash)
    set_gradients(list(model.parameters()), 0, 0)
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer)
    for loaded_as in KINDS:
        fresh, again = wrapped(loaded_as, 1, clash)
        checkpoint.load(tmp_path, fresh, again)
        assert torch.equal(*(flat(list(m.state_dict().values())) for m in (model, fresh)))
        pairs = zip(optimizer.state.values(), again.state.values(), strict=True)
        assert all(torch.equal(a["memory"], b["memory"]) for a, b in pairs)


def in_ddp(group, folder):
    """Saved inside DistributedDataParallel, loaded without, and the other way."""
    rank = dist.get_rank(group)
    for inside in (True, False):
        model, optimizer, _ = build(group)
        set_gradients(list(model.parameters()), rank, 0)
        optimizer.step()
        ddp = torch.nn.parallel.DistributedDataParallel(network(), process_group=group)
        gmc_cuda.local_gradients(ddp)
        other = gmc_cuda.GMC(ddp.parameters(), lr=0.1, density=0.1, process_group=group)
        pairs = [(model, optimizer), (ddp, other)]
        (first, own), (second, others) = pairs[::-1] if inside else pairs
        set_gradients(list(first.parameters()), rank, 1)
        own.step()
        checkpoint.save(f"{folder}/{inside}", first, own)
        checkpoint.load(f"{folder}/{inside}", second, others)
        params = list(first.parameters()), list(second.parameters())
        assert torch.equal(*map(flat, params))
        assert torch.equal(memory_of(own, params[0]), memory_of(others, params[1]))


def test_distributed_data_parallel(pool, tmp_path):
    pool.run(2, in_ddp, str(tmp_path))


def test_plain_names():
    for name in (
        "a.weight",
        "module.a.weight",
        "_orig_mod.module.a.weight",
        "module._orig_mod.a._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.weight",
        "_fpw_module.a.module.weight",
        "_forward_module.module.a.weight",
    ):
        assert plain_name(name) == "a.weight"
    # Only parts that are a wrapper's as a whole.
    assert plain_name("my_module.modules.weight") == "my_module.modules.weight"


def test_names_that_are_one_without_wrappers_stay_apart():
    names = ["weight", "module.weight", "a._orig_mod.weight"]
    for prefix in ("", "module.", "module.module.", "_orig_mod.module."):
        found = plain_names(prefix + name for name in names)
        assert list(found.values()) == ["weight", "module.weight", "a.weight"]
    with pytest.raises(ValueError, match="rename one"):
        plain_names(["a.weight", "a._orig_mod.weight"])


# ------------------------------------------------------------------------------ places, defaults


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "gs://b/r", "hdfs://host/r", "file:///tmp/r", "dbfs:/r", "az://c/r"]
)
@pytest.mark.parametrize("as_path", [False, True])
def test_urls_are_refused(tmp_path, monkeypatch, url, as_path):
    monkeypatch.chdir(tmp_path)
    model, optimizer, _ = build(None)
    for call in (checkpoint.save, checkpoint.load):
        with pytest.raises(ValueError, match=r"folder: got the URL .*(?s:.*)save\('/shared/run'"):
            call(Path(url) if as_path else url, model, optimizer)
    assert not list(tmp_path.iterdir())


def test_homes_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, optimizer, _ = build(None)
    for folder in ("~/run", Path("~") / "run", b"~/run"):
        checkpoint.save(folder, model, optimizer, {"n": 1}, keep=0)
        assert os.listdir(tmp_path) == ["run"]
        assert checkpoint.load(folder, model, optimizer) == {"n": 1}
    with pytest.raises(ValueError, match="must name the home of a user that exists"):
        checkpoint.save("~nobody-of-this-name/run", model, optimizer)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wait", [True, False])
def test_defaults_of_torch_have_no_effect(tmp_path, make, dtype, wait):
    run = model, optimizer, _ = build(None, make)
    go_on(run, range(3), 0)
    twin = build(None, make)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        checkpoint.save(tmp_path, model, optimizer, {"t": torch.ones(2, device="cpu")}, wait=wait)
        extra = checkpoint.load(tmp_path, *twin[:2])
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)
    assert extra["t"].device.type == "cpu"
    for other, own in zip(twin[1].state.values(), optimizer.state.values(), strict=True):
        for name in own:
            assert other[name].dtype == torch.float32
            assert torch.equal(other[name], own[name])
    assert torch.equal(flat(list(twin[0].parameters())), flat(list(model.parameters())))


class WithExtraState(torch.nn.Linear):
    said: object = None

    def get_extra_state(self):
        return self.said

    def set_extra_state(self, state):
        self.said = state


def test_extra_state_of_modules(tmp_path):
    model, fresh = WithExtraState(3, 2), WithExtraState(3, 2)
    model.said = {"seen": 3, "scale": torch.ones(2)}
    checkpoint.save(tmp_path, model, gmc_cuda.GMC(model.parameters(), lr=0.1))
    checkpoint.load(tmp_path, fresh, gmc_cuda.GMC(fresh.parameters(), lr=0.1))
    assert fresh.said["seen"] == 3
    assert torch.equal(fresh.said["scale"], torch.ones(2))
    model.said = object()
    with pytest.raises(TypeError, match="extra state: got an object that torch.load"):
        checkpoint.save(tmp_path, model, gmc_cuda.GMC(model.parameters(), lr=0.1))


def test_a_view_is_saved_without_what_it_is_a_view_of(tmp_path):
    model = torch.nn.Linear(3, 2)
    model.weight.data = torch.zeros(1_000_000)[:6].view(2, 3)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path, model, optimizer)
    (shared,) = tmp_path.glob("*/shared.pt")
    assert shared.stat().st_size < 10_000


def test_other_weights_beside_the_optimizers_are_refused_by_name(tmp_path):
    def make(features):
        model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, features)])
        return model, gmc_cuda.GMC(model[0].parameters(), lr=0.1)

    checkpoint.save(tmp_path, *make(4))
    model, optimizer = make(5)
    with pytest.raises(ValueError, match=r"got '1.weight' of the model with shape \(4, 2\), must"):
        checkpoint.load(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match="has '1.bias' of a model, this model does not have it"):
        checkpoint.load(tmp_path, torch.nn.ModuleList([model[0]]), optimizer)
    model.append(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="lacks '2.bias' of a model, must have it"):
        checkpoint.load(tmp_path, model, optimizer)


# ---------------------------------------------------------------------------------- other formats


def write_format_2(group, folder):
    """As the version before wrote it, from what a run of now holds."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    run = model, optimizer, _ = build(group)
    go_on(run, range(3), rank)
    params = list(model.parameters())
    own, common = {}, {}
    for i, param in enumerate(params):
        own[f"{i}.memory"] = optimizer.state[param]["memory"].clone()
        common[f"{i}.momentum_buffer"] = optimizer.state[param]["momentum_buffer"].clone()
    part = f"{folder}/0123abcd"
    os.makedirs(part, exist_ok=True)
    state = {"model": get_model_state_dict(model), "shared": common, f"worker{rank}": own}
    dcp_save(state, checkpoint_id=part, process_group=group)
    if rank == 0:
        found = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()]
        facts = {
            "format": 2,
            "optimizer": "GMC",
            "number of shards": 1,
            "parameters": found,
            "world_size": size,
            "averaged": False,
            "groups": optimizer.state_dict()["param_groups"],
            "held": [{"memory": False, "momentum_buffer": True} for _ in params],
            "extra": {"step": 3, "scheduler": run[2].state_dict()},
        }
        torch.save(facts, f"{part}/facts.pt")
        with open(f"{folder}/current", "w") as file:
            file.write("0123abcd")
    dist.barrier(group)
    start = mean(group, memory_of(optimizer, params)), aggregate_of(optimizer, params), flat(params)
    go_on(run, range(3, 6), rank)
    return start, (memory_of(optimizer, params), flat(params))


@pytest.mark.parametrize("loaded_on", [1, 2, 4])
def test_format_2_can_be_loaded(pool, tmp_path, loaded_on):
    folder = str(tmp_path / "run")
    saved = pool.run(2, write_format_2, folder)
    start, ends = saved[0][0], [end for _, end in saved]
    ends = ends if loaded_on == 2 else None
    pool.run(loaded_on, load_and_go_on, folder, gmc_cuda.GMC, {}, start, ends)


def test_later_formats_are_refused(tmp_path, monkeypatch):
    model, optimizer, _ = build(None)
    monkeypatch.setattr(snapshot, "FORMAT", 4)
    checkpoint.save(tmp_path, model, optimizer)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="got format 4, this version of gmc_cuda reads 2 and 3"):
        checkpoint.load(tmp_path, model, optimizer)
