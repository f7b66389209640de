"""What a checkpoint survives: kills, full and separate disks, lost groups, damaged files."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from gmc_cuda import checkpoint
from gmc_cuda._engine import background, parts
from gmc_cuda._engine.exchange import GroupLost
from support.full_disk import full_disk
from support.problems import flat, set_gradients
from support.workers import Workers


def build():
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(11, 7), torch.nn.Linear(7, 3))
    return model, gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)


def train(model, optimizer, step):
    params = list(model.parameters())
    set_gradients(params, dist.get_rank() if dist.is_initialized() else 0, step)
    optimizer.step()
    return {"step": step, "weights": flat(params)}


def whole(extra, model):
    """Whether what was loaded is of one step."""
    return torch.equal(extra["weights"], flat(list(model.parameters())))


def complete(folder):
    return [part.name for part in parts.complete(Path(folder))]


# ----------------------------------------------------------------------------------------- kill -9

# Many by hand: GMC_CUDA_KILLS=100 pytest tests/test_checkpoint_faults.py -k killed
KILLS = int(os.environ.get("GMC_CUDA_KILLS", "4"))


def save_for_ever(say, folder, store, destroy):
    """Says the step that it has loaded, and then each that result() has confirmed."""
    model, optimizer = build()
    step = 0
    if os.path.exists(f"{folder}/current"):
        extra = checkpoint.load(folder, model, optimizer)
        assert whole(extra, model)
        step = extra["step"]
    train(model, optimizer, step + 1)  # the first step of a process takes long
    say(step)
    while True:
        step += 1
        extra = train(model, optimizer, step)
        saved = checkpoint.save(folder, model, optimizer, extra, wait=False)
        if destroy:
            rank, size = dist.get_rank(), dist.get_world_size()
            dist.destroy_process_group()
        saved.result()
        say(step)
        if destroy:
            where = f"file://{store}{step}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
            optimizer.process_group = dist.group.WORLD


def said_before_the_end(workers, rank):
    """The two are not killed at the same moment: the later one may have noticed the loss before."""
    try:
        while True:
            yield workers.hear(rank)
    except (EOFError, OSError):
        return
    except AssertionError as failed:
        if not re.search("GroupLost|connectFullMesh", str(failed)):
            raise


@pytest.mark.parametrize("destroy", [False, True], ids=["group stays", "group destroyed"])
def test_killed_saves_leave_a_whole_checkpoint(tmp_path, destroy):
    """After each kill the newest that result() has confirmed is loaded, or a later one."""
    moments, confirmed, reached = random.Random(20), 0, []
    for life in range(KILLS + 1):
        place = tmp_path / f"life{life}"
        place.mkdir()
        args = str(tmp_path / "run"), str(place / "again"), destroy
        with Workers(2, place, save_for_ever, *args) as workers:
            loaded = workers.results()
            assert loaded[0] == loaded[1]
            assert loaded[0] >= confirmed
            if life == KILLS:
                break
            time.sleep(moments.uniform(0, 0.4))
            for rank in moments.sample([0, 1], 2):
                workers.send_signal(rank, signal.SIGKILL)
                time.sleep(moments.choice([0, moments.uniform(0, 0.03)]))
            heard = [step for rank in (0, 1) for step in said_before_the_end(workers, rank)]
        confirmed = max([loaded[0], *heard])
        reached.append(confirmed - loaded[0])
    assert sum(reached) > 0, "some saves must have been confirmed before a kill"
    print(f"{KILLS} kills, {confirmed} saves confirmed, saves in a life: {reached}")


# ------------------------------------------------------------------------- the end of a script

SCRIPT = """
import os, resource, signal, sys, torch, torch.distributed as dist, gmc_cuda
rank, port, folder, disk = int(sys.argv[1]), *sys.argv[2:5]
# A store in a file would need the disk too.
dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)
for step in (1, 2):
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    if step == 2 and rank == 1 and disk == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    gmc_cuda.checkpoint.save(folder, model, optimizer, {"step": step}, wait=step == 1)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("disk", ["free", "full"])
def test_a_script_that_ends_after_a_save_in_the_background(tmp_path, disk):
    script, folder = tmp_path / "script.py", str(tmp_path / "run")
    script.write_text(SCRIPT)
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, folder, disk],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    model = torch.nn.Linear(64, 64)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)
    extra = checkpoint.load(folder, model, optimizer)
    if disk == "free":
        assert extra == {"step": 2}
        assert not any("RuntimeWarning" in error for error in errors)
    else:
        assert extra == {"step": 1}
        for error in errors:
            assert "RuntimeWarning: a save in the background has failed" in error
            assert "the checkpoint was not saved; worker 1: " in error


def test_a_child_of_a_fork_does_not_wait_for_its_parents_saves():
    background._saves.append(background.Saving())
    try:
        child = os.fork()
        if child == 0:
            background.finish()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        background._saves.clear()


# ---------------------------------------------------------------------------------- failing writes


def fail_beside_the_training(say, folder, failing, room, read):
    rank = dist.get_rank()
    model, optimizer = build()
    checkpoint.save(folder, model, optimizer, train(model, optimizer, 1)).result()
    extra = train(model, optimizer, 2)
    if rank == failing:
        with full_disk(room):
            saved = checkpoint.save(folder, model, optimizer, extra, wait=False)
            saved.wait()
    else:
        saved = checkpoint.save(folder, model, optimizer, extra, wait=False)
    if read:
        what = "OSError" if room else "worker 1 cannot write into"
        words = f"the checkpoint was not saved; .*worker {failing}: {what}"
        with pytest.raises(RuntimeError, match=words):
            saved.result()
        assert checkpoint.load(folder, model, optimizer)["step"] == 1
        warnings.simplefilter("error", RuntimeWarning)
    extra = train(model, optimizer, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        checkpoint.save(folder, model, optimizer, extra)
    seen = [w for w in seen if issubclass(w.category, RuntimeWarning)]
    assert len(seen) == (not read)
    if not read:
        assert "the checkpoint was not saved" in str(seen[0].message)
        assert seen[0].filename == __file__
    assert checkpoint.load(folder, model, optimizer)["step"] == 3
    dist.barrier()
    return complete(folder)


@pytest.mark.parametrize(
    "failing,room,read", [(0, 500, True), (1, 500, True), (1, 500, False), (1, 0, True)]
)
def test_a_disk_that_is_full_beside_the_training(tmp_path, failing, room, read):
    """With room 0 the worker cannot even say so in a file."""
    args = str(tmp_path / "run"), failing, room, read
    start = time.monotonic()
    with Workers(2, tmp_path, fail_beside_the_training, *args, seconds=300) as workers:
        kept, _ = workers.results()
    assert len(kept) == 2, "the one before and the one after"
    assert time.monotonic() - start < 100, "the others hear of it before their time-out"


def lose_what_was_written(say, folder, how):
    """A file system that says that it has written, on rank 1, and has not."""
    model, optimizer = build()
    checkpoint.save(folder, model, optimizer, train(model, optimizer, 1))
    extra = train(model, optimizer, 2)
    write = parts.write

    def lie(path, value):
        entry = write(path, value)
        if how == "cut":
            os.truncate(path, entry[0] // 2)
        elif how == "flip":
            flip(path)
        else:
            path.unlink()
        return entry

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(parts, "write", lie)
        for wait in (True, False):
            with pytest.raises(RuntimeError, match="the checkpoint was not saved; worker 0: Dam"):
                checkpoint.save(folder, model, optimizer, extra, wait=wait).result()
    assert checkpoint.load(folder, model, optimizer)["step"] == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flip", "lost"])
def test_a_file_that_is_not_what_was_written_is_not_published(tmp_path, how):
    with Workers(2, tmp_path, lose_what_was_written, str(tmp_path / "run"), how) as workers:
        workers.results()


# ------------------------------------------------------------------------------------ lost workers


def save_with_one_stopped(say, folder):
    model, optimizer = build()
    checkpoint.save(folder, model, optimizer, train(model, optimizer, 1))
    extra = train(model, optimizer, 2)
    if dist.get_rank() == 1:
        write = parts.write
        parts.write = lambda path, value: (os.kill(os.getpid(), signal.SIGSTOP), write(path, value))
    saved = checkpoint.save(folder, model, optimizer, extra, wait=False)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        saved.result()
    return str(caught.value), time.monotonic() - start


def test_the_groups_time_out_holds_in_the_background(tmp_path):
    folder = str(tmp_path / "run")
    with Workers(3, tmp_path, save_with_one_stopped, folder, seconds=4) as workers:
        for words, seconds in workers.results([0, 2]):
            assert "worker 1: worker 1 did not answer within 4 s, the time-out of the" in words
            assert 3 < seconds < 10
    model, optimizer = build()
    assert checkpoint.load(folder, model, optimizer)["step"] == 1


def save_around_a_new_group(say, folder, store):
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer = build()
    for step in (1, 2, 3):
        extra = train(model, optimizer, step)
        saved = checkpoint.save(folder, model, optimizer, extra, wait=False)
        dist.destroy_process_group()
        if step == 2:
            with pytest.raises(RuntimeError, match="optimizer.process_group = torch.distributed.g"):
                checkpoint.save(folder, model, optimizer)
        timeout = timedelta(seconds=30)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}{step}", rank=rank, world_size=size, timeout=timeout
        )
        optimizer.process_group = dist.group.WORLD
        dist.new_group(backend="gloo")
    saved.result()
    assert checkpoint.load(folder, model, optimizer)["step"] == 3


def test_saves_in_the_background_before_and_after_a_new_group(tmp_path):
    args = str(tmp_path / "run"), str(tmp_path / "again")
    with Workers(2, tmp_path, save_around_a_new_group, *args) as workers:
        workers.results()


def call_alone(say, folder, alone, call, other):
    """One rank calls what the other does not; both must hear of it, and neither may abort."""
    model, optimizer = build()
    checkpoint.save(folder, model, optimizer, train(model, optimizer, 1))
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        if dist.get_rank() == alone:
            getattr(checkpoint, call)(folder, model, optimizer)
        elif other == "step":
            train(model, optimizer, 2)
        elif other == "barrier":
            dist.barrier()
        elif other == "sleep":
            time.sleep(6)
            raise RuntimeError("slept")
    waited = time.monotonic() - start
    return str(caught.value), waited


@pytest.mark.parametrize(
    "alone,call,other",
    [(0, "save", "step"), (1, "save", "barrier"), (0, "load", "sleep"), (1, "load", "step")],
)
def test_a_call_on_one_rank_only_ends_in_an_error(tmp_path, alone, call, other):
    args = str(tmp_path / "run"), alone, call, other
    with Workers(2, tmp_path, call_alone, *args, seconds=4) as workers:
        words, waited = workers.results()[alone]
    missing = f"all workers must call checkpoint.{call}, but rank {1 - alone} did not within 4 s"
    assert missing in words
    assert 3 < waited < 10


# ------------------------------------------------------------------------------- separate storage


def save_on_two_disks(say, folder, wait):
    rank = dist.get_rank()
    model, optimizer = build()
    os.mkdir(f"{folder}/{rank}")
    with pytest.raises(RuntimeError, match="does not see .*storage that all workers see"):
        checkpoint.save(f"{folder}/{rank}", model, optimizer, wait=wait)
    dist.barrier()
    assert os.listdir(f"{folder}/{rank}") == []
    before = flat(list(model.parameters()))
    with pytest.raises(FileNotFoundError):
        checkpoint.load(f"{folder}/{rank}", model, optimizer)
    checkpoint.save(f"{folder}/0", model, optimizer)
    with pytest.raises(RuntimeError, match="worker 1: FileNotFoundError.*storage that all workers"):
        checkpoint.load(f"{folder}/{rank}", model, optimizer)
    assert torch.equal(flat(list(model.parameters())), before)
    return optimizer.stats()["steps"]


@pytest.mark.parametrize("wait", [True, False])
def test_a_folder_on_two_disks_is_found_on_every_rank(tmp_path, wait):
    with Workers(2, tmp_path, save_on_two_disks, str(tmp_path), wait) as workers:
        workers.results()


def load_where_one_cannot(say, folder, how):
    """Damage that only rank 1 meets, since it is in rank 1's file."""
    rank = dist.get_rank()
    model, optimizer = build()
    for step in (1, 2):
        checkpoint.save(folder, model, optimizer, train(model, optimizer, step))
    (newest, older) = complete(folder)
    dist.barrier()
    if rank == 1:
        path = Path(folder) / newest / "worker1.pt"
        {"cut": lambda: os.truncate(path, 50), "flip": lambda: flip(path), "lost": path.unlink}[
            how
        ]()
    dist.barrier()
    before = train(model, optimizer, 3)["weights"]
    with pytest.raises(RuntimeError, match="checkpoint is damaged") as caught:
        checkpoint.load(folder, model, optimizer)
    assert torch.equal(flat(list(model.parameters())), before)
    (line,) = re.findall(r"gmc_cuda.checkpoint.load\(.*\)", str(caught.value))
    assert older in line
    assert eval(line)["step"] == 1
    return str(caught.value)


@pytest.mark.parametrize("how", ["cut", "flip", "lost"])
def test_damage_is_found_on_every_rank(tmp_path, how):
    with Workers(2, tmp_path, load_where_one_cannot, str(tmp_path / "run"), how) as workers:
        assert all("worker1.pt" in words for words in workers.results())


@pytest.mark.parametrize("file", ["facts.pt", "shared.pt", "worker0.pt", "files.json", "current"])
@pytest.mark.parametrize("how", ["cut", "flip", "empty"])
def test_every_file_is_checked(tmp_path, file, how):
    model, optimizer = build()
    for step in (1, 2):
        checkpoint.save(tmp_path, model, optimizer, {"step": step})
    path = tmp_path / file if file == "current" else tmp_path / complete(tmp_path)[0] / file
    if how == "flip":
        flip(path)
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size // 2)
    before = flat(list(model.parameters()))
    with pytest.raises(RuntimeError, match="complete|damaged|names") as caught:
        checkpoint.load(tmp_path, model, optimizer)
    assert torch.equal(flat(list(model.parameters())), before)
    line = re.findall(r"gmc_cuda.checkpoint.load\(.*\)", str(caught.value))[-1]
    assert eval(line) == {"step": 1}
    checkpoint.save(tmp_path, model, optimizer, {"step": 3})
    assert checkpoint.load(tmp_path, model, optimizer) == {"step": 3}


# ------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_how_many_older_ones_stay(tmp_path, keep):
    model, optimizer = build()
    for step in range(6):
        checkpoint.save(tmp_path, model, optimizer, {"step": step}, wait=step % 2 == 0, keep=keep)
    background.finish()
    names = complete(tmp_path)
    assert len(names) == keep + 1
    for age, name in enumerate(names):
        assert checkpoint.load(tmp_path, model, optimizer, name=name) == {"step": 5 - age}
    assert checkpoint.load(tmp_path, model, optimizer) == {"step": 5}


@pytest.mark.parametrize("keep", [-1, 1.5, None, True])
def test_wrong_numbers_to_keep(tmp_path, keep):
    with pytest.raises(ValueError, match="keep: got .*, must be an integer of at least 0"):
        checkpoint.save(tmp_path, *build(), keep=keep)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_there(tmp_path):
    model, optimizer = build()
    checkpoint.save(tmp_path, model, optimizer)
    with pytest.raises(
        FileNotFoundError, match="(?s)no complete checkpoint 'last' in .*name='000001"
    ):
        checkpoint.load(tmp_path, model, optimizer, name="last")


def test_what_killed_saves_left_goes_and_other_folders_stay(tmp_path):
    model, optimizer = build()
    for name in ("000007-0123abcd", "logs", "0123456"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "facts.pt").touch()
    checkpoint.save(tmp_path, model, optimizer)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 4
    assert {"logs", "0123456", "current"} < set(left)


def test_what_is_saved_beside_the_training_is_the_state_at_the_call(tmp_path):
    """The extra's containers too, as those of a scheduler's state_dict."""
    model, optimizer = build()
    extra = {"losses": [1.0], "nested": {"steps": [torch.ones(2)]}}
    saved = checkpoint.save(tmp_path, model, optimizer, extra, wait=False)
    extra["losses"].append(2.0)
    extra["nested"]["steps"][0].zero_()
    saved.result()
    loaded = checkpoint.load(tmp_path, model, optimizer)
    assert loaded["losses"] == [1.0]
    assert loaded["nested"]["steps"][0].tolist() == [1.0, 1.0]


def test_group_lost_is_a_runtime_error():
    assert issubclass(GroupLost, RuntimeError)
