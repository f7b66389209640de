"""The demo, end to end: small runs as a user would start them, and how they end when disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from examples.demo import digits, launch, training, worker
from examples.demo.digits import partition
from examples.demo.methods import share_of_lr
from examples.demo.options import METHODS, parse
from examples.demo.progress import Progress
from examples.demo.report import print_end
from examples.demo.training import Point, Run
from support import scripts

ROOT = Path(__file__).parent.parent
DEMO = ["-m", "examples.demo"]
SECONDS_TO_END = 20  # with room for a busy machine; usually one or two


def environment():
    """This process's, without what a launcher of these tests may have left there."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in launcher}


def run(command, output, **how):
    done = scripts.run(*command, "--device", "cpu", "--output", output, cwd=ROOT, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_text_with_every_method(tmp_path):
    printed = run([*DEMO, "--steps", "12", "--batch", "2"], tmp_path, workers=2)
    for part in ("dense momentum SGD", "GMC", "DGC", "memory SGD", "text.png", "text.json"):
        assert part in printed
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")

    content = read(tmp_path / "text.json")
    assert content["options"]["workers"] == 2
    assert content["options"]["bytes_ratio"] == 100
    assert {"date", "hardware", "versions", "task", "units"} <= content.keys()
    assert {"python", "torch", "gmc_cuda"} <= content["versions"].keys()
    assert str(Path.home()) not in json.dumps(content)
    assert str(tmp_path) not in json.dumps(content)
    assert list(content["results"]) == list(METHODS)
    for method, result in content["results"].items():
        (one,) = result["runs"]
        curve = one["curve"]
        assert (curve[0]["step"], curve[0]["bytes_sent"], curve[-1]["step"]) == (0, 0, 12)
        assert curve[-1]["loss"] < curve[0]["loss"]
        assert one["seconds_per_step"] > 0
        assert one["dense_bytes_per_step"] == 4 * one["parameters"]
        assert curve[-1]["bytes_sent"] == pytest.approx(12 * one["bytes_per_step"])
        if method == "dmsgd":
            assert result["reduction"] == pytest.approx(1, rel=1e-3)
        else:
            assert 100 <= result["reduction"] < 102
        assert result["momentum"] < 1
        assert result["lr"] > 0
    assert content["results"]["dmsgd"]["momentum"] > content["results"]["gmc"]["momentum"]
    # The same parameters at the start, whatever the method.
    assert len({r["runs"][0]["curve"][0]["loss"] for r in content["results"].values()}) == 1


@pytest.mark.slow
def test_torchrun_on_a_line_of_ones_own(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--task", "digits", "--non-iid", "--steps", "6", "--seeds", "2"]
    printed = run([*torchrun, *DEMO, *options, "--methods", "dmsgd", "gmc"], tmp_path)
    assert "±" in printed
    assert "points from dense" in printed
    content = read(tmp_path / "digits-non-iid.json")
    assert content["options"]["workers"] == 2
    for result in content["results"].values():
        first, second = (one["curve"] for one in result["runs"])
        assert first != second  # two seeds


def trained(group, seed):
    """The loss curve of GMC on digits, by the four workers of the default group."""
    options = parse(["--task", "digits", "--steps", "4", "--workers", "4"])
    task = digits.load(dist.get_rank(), 4, False)
    progress = Progress("", options.steps, shown=False)
    return training.train("gmc", task, options, seed, torch.device("cpu"), progress).curve


@pytest.mark.slow
def test_a_seed_decides_the_numbers(pool, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    first, again, other = (pool.run(4, trained, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first == 4 * first[:1]


@pytest.fixture
def started(tmp_path):
    """A run of two workers in the middle of training, and the process ids of its workers."""
    process = subprocess.Popen(
        [sys.executable, *DEMO, "--task", "digits", "--workers", "2", "--seeds", "1",
         "--steps", "5000", "--device", "cpu", "--output", str(tmp_path)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("  runs"):  # the last line before training
            break
    else:
        pytest.fail(process.communicate()[1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(child) for child in children]
    assert len(workers) == 2
    time.sleep(0.5)
    yield process, workers
    process.kill()
    process.communicate()


def end(process, workers):
    """(exit status, standard error) of a run that must not end before its workers."""
    status = process.wait(timeout=SECONDS_TO_END)
    alive = [pid for pid in workers if _alive(pid)]
    assert not alive, f"workers {alive} outlived the run"
    return status, process.communicate()[1]


def _alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_a_killed_worker_ends_the_run_with_one_message(started):
    process, workers = started
    os.kill(workers[1], signal.SIGKILL)
    status, errors = end(process, workers)
    assert status == 1
    said = f"worker 1 (process {workers[1]}) was ended by SIGKILL; the other workers were stopped"
    assert errors == f"demo: {said}\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_run_with_one_message(started):
    process, workers = started
    process.send_signal(signal.SIGINT)
    status, errors = end(process, workers)
    assert status == 130
    assert errors.splitlines() == ["demo: stopped by Ctrl-C; all workers have ended"]


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ({0: LOST, 1: -9, 2: -15}, "worker 1 (process 101) was ended by SIGKILL"),
        ({0: LOST, 1: -15, 2: ValueError("bad")}, "worker 2 failed: ValueError: bad"),
        ({1: LOST}, f"worker 1 failed: RuntimeError: {LOST}"),
        ({3: 5}, "worker 3 failed: exit status 5"),
    ],
)
def test_the_message_names_the_culprit_not_its_victims(ended, said, tmp_path, monkeypatch):
    """From what torchrun hands over: exit statuses, and the files in which workers wrote errors."""
    failures = {}
    for rank, how in ended.items():
        file = tmp_path / f"error-{rank}.json"
        code = how
        if isinstance(how, Exception):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
            code = raise_in_worker(how, monkeypatch)
        failures[rank] = ProcessFailure(rank, 100 + rank, code, str(file))
    assert launch.cause(failures).splitlines()[-1] == said


def raise_in_worker(error, monkeypatch):
    """The exit status of a worker whose work raises the error."""

    def work(_):
        raise error

    monkeypatch.setattr(worker, "_work", work)
    monkeypatch.setattr(worker.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        worker.run(None)
    return ended.value.code


def test_a_worker_of_another_launcher_says_its_error_itself(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(worker, "_work", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.run(None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "/dev/null/folder"], "demo: [Errno 20] Not a directory: '/dev/null/folder'"),
        (["--device", "cuda", "--workers", "1000"], "demo: --device cuda"),
    ],
)
def test_what_cannot_work_is_said_before_workers_start(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch.torchrun, "main", lambda _: pytest.fail("workers were started"))
    assert launch.run(parse(arguments), arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@given(
    labels=st.lists(st.integers(0, 9), min_size=8, max_size=300),
    world=st.integers(1, 8),
    non_iid=st.booleans(),
)
def test_partition_is_disjoint_complete_and_even(labels, world, non_iid):
    labels = torch.tensor(labels)
    parts = [partition(labels, rank, world, non_iid) for rank in range(world)]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if non_iid:
        # A cut of the sorted list: neighbours share at most the class at the cut.
        held = [set(labels[part].tolist()) for part in parts]
        assert sum(map(len, held)) <= len(set(labels.tolist())) + world - 1


def test_partition_of_digits_gives_each_worker_few_classes():
    from sklearn.datasets import load_digits

    labels = torch.from_numpy(load_digits().target)
    mixed = [labels[partition(labels, rank, 4, False)].unique() for rank in range(4)]
    sorted_out = [labels[partition(labels, rank, 4, True)].unique() for rank in range(4)]
    assert [len(classes) for classes in mixed] == [10] * 4
    assert all(len(classes) <= 4 for classes in sorted_out)


def test_too_many_workers_for_the_data():
    with pytest.raises(ValueError, match="digits has 3 training images, too few for 4 workers"):
        partition(torch.tensor([0, 1, 2]), 0, 4, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "argument --density: must be a number above 0, at most 1, got '0'"),
        (["--density", "one"], "argument --density: must be a number above 0, at most 1"),
        (["--workers", "0"], "argument --workers: must be a whole number above 0, got '0'"),
        (["--momentum", "1"], "argument --momentum: must be a number from 0 to below 1"),
        (["--lr", "nan"], "argument --lr: must be a number above 0"),
        (["--methods", "adam"], "argument --methods: invalid choice: 'adam'"),
        (["--schedule", "20", "10"], "argument --schedule: steps must increase, got [20, 10]"),
        (["--steps", "5", "--warmup", "6"], "argument --warmup: 6 is more than --steps 5"),
        (["--warmup", "5"], "argument --warmup: needs --density, which it lowers to"),
        (["--density", "0.1", "--bytes-ratio", "9"], "not allowed with argument --density"),
        (["--step", "5"], "unrecognized arguments: --step 5"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_launcher_decides_how_many_workers(capsys, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert parse([]).workers == 3
    with pytest.raises(SystemExit):
        parse(["--workers", "2"])
    assert "--workers: 2 but the launcher started 3" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit):
        parse([])
    assert "RANK is set in the environment but WORLD_SIZE is not" in capsys.readouterr().err


def test_defaults_belong_to_the_task(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    text, digits = parse([]), parse(["--task", "digits", "--steps", "40"])
    assert (text.workers, text.methods, text.seeds) == (4, list(METHODS), 1)
    assert (digits.seeds, digits.schedule) == (3, None)
    assert parse(["--schedule"]).schedule == []
    assert (text.density, text.bytes_ratio) == (None, 100)
    assert (parse(["--density", "0.1"]).density, text.wire_dtype) == (0.1, "float4_e2m1fn_x2")
    assert set(text.tuned) == set(METHODS)
    same = parse(["--lr", "0.5", "--momentum", "0", "--methods", "gmc"]).tuned
    assert same == {"gmc": {"momentum": 0, "lr": 0.5}}


def test_learning_rate_rises_and_falls():
    shares = [share_of_lr(step, 20, 0.1) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[11] == pytest.approx(0.5)
    assert 0 < shares[19] < 0.01
    assert share_of_lr(0, 1, 0.1) == 1


def test_the_table_fits_80_columns(capsys):
    """With the widest numbers that the defaults give; rich would cut them short."""
    ends = [Point(1, 1, 1.812 + i / 50, 0.522 + i / 99) for i in range(3)]
    runs = [Run(0, 470_528, 18_800.0, 1_882_112, 0.339, 0, [end]) for end in ends]
    options = parse(["--seeds", "3"])
    print_end(SimpleNamespace(unit="next byte"), options, dict.fromkeys(METHODS, runs))
    table, _ = capsys.readouterr().out.split("Loss and accuracy")
    assert "…" not in table
    assert max(map(len, table.split("\n"))) <= 80
    assert table.count("1.832 ± 0.020") == table.count("53.2 ± 1.0") == len(METHODS)
