"""gmc_cuda.checkpoint: every worker's memory, on as many workers and on others."""

import copy
import os
import resource
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from problems import aggregate_of, flat, mean, memory_of, same_on_all_ranks, set_gradients
from workers import WorkerPool

import gmc_cuda
from gmc_cuda import checkpoint


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
    assert extra["step"] == 3 and optimizer.param_groups[0]["lr"] == 0.05
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
        (gmc_cuda.DGC, {}),
    ],
)
def test_resuming_keeps_everything(pool, tmp_path, saved_on, loaded_on, make, options):
    """Invariants 8 and 10."""
    folder = str(tmp_path / "run")
    saved = pool.run(saved_on, save_and_go_on, folder, make, options, True)
    start, ends = saved[0][0], [end for _, end in saved]
    ends = ends if saved_on == loaded_on else None
    pool.run(loaded_on, load_and_go_on, folder, make, options, start, ends)


@pytest.fixture
def fresh_pool():
    """Workers that have made the same groups so far, and are in different numbers of them."""
    workers = WorkerPool()
    yield workers
    workers.stop()


def test_saving_beside_the_training_on_several_workers(fresh_pool, tmp_path):
    folder, case = str(tmp_path / "run"), (gmc_cuda.GMC, {})
    saved = fresh_pool.run(4, save_and_go_on, folder, *case, False)  # up to torch 2.13 it waits
    ends = [end for _, end in saved]
    fresh_pool.run(4, load_and_go_on, folder, *case, saved[0][0], ends)


def named_differently(group, folder):
    rank = dist.get_rank(group)
    model, optimizer, _ = build(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_hash_ranks_to_str", lambda ranks: f"of {rank}")
        with pytest.warns(UserWarning, match="checkpoint.save: wait=False waits, because") as seen:
            future = checkpoint.save(folder, model, optimizer, wait=False)
    assert future.done() and seen[0].filename == __file__
    checkpoint.load(folder, model, optimizer)


def test_where_no_group_can_be_made_the_save_is_waited_for(pool, tmp_path):
    pool.run(2, named_differently, str(tmp_path / "run"))


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
    assert len(list(tmp_path.iterdir())) == 2, "one part, and the file that names it"


def fail_to_save(group, folder):
    """A disk that is full for one worker: all raise, and the checkpoint before is intact."""
    rank = dist.get_rank(group)
    run = model, optimizer, _ = build(group)
    go_on(run, range(2), rank)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    go_on(run, range(2, 4), rank)
    before = memory_of(optimizer, list(model.parameters()))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(RuntimeError, match="the checkpoint was not saved; .*worker"):
            checkpoint.save(folder, model, optimizer, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
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
