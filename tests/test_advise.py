"""`python -m gmc_cuda.advise`, whose estimates are shown right by benchmarks over slow links."""

import copy
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from gmc_cuda import advise

MODEL = """
import torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.BatchNorm1d(300),
                                torch.nn.Linear(300, 8))
    return model, lambda model: model(torch.randn(4, 8)).square().mean().backward()
"""


def make():
    made = {}
    exec(MODEL, made)
    return made["make"]()


def measured(group, seconds, slow=0.0, delay=0.0):
    model, backward = make()
    before = copy.deepcopy(model.state_dict())
    all_reduce = dist.all_reduce

    def slowly(tensor, *args, **kwargs):
        time.sleep(delay * tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def late(model):
        time.sleep(slow * dist.get_rank(group))
        backward(model)

    dist.all_reduce = slowly
    try:
        found = advise.measure(model, late, seconds, group)
    finally:
        dist.all_reduce = all_reduce
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(p.grad is None for p in model.parameters())
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_method_is_tried_and_the_model_stays_as_it_is(pool, size):
    first, *others = pool.run(size, measured, 1.0)
    assert [row.method for row in first] == ["compute alone", "DDP", *advise.CANDIDATES]
    assert all(row.seconds > 0 and not row.estimated for row in first)
    for other in others:
        assert [row.seconds for row in other] == [row.seconds for row in first]
    ring = first[1].link_bytes
    assert ring == 2 * (size - 1) * 4 * (8 * 300 + 300 + 600 + 2400 + 8) // size
    for row in first[2:]:
        assert 0.9 * ring / 100 < row.link_bytes <= 1.3 * ring / 100


def test_the_slowest_worker_counts(pool):
    for row in pool.run(2, measured, 1.0, 0.05)[0]:
        assert 0.05 <= row.seconds < 0.2, row


def test_what_takes_too_long_is_estimated(pool):
    """An all-reduce of 1 ms an element: of all 5708, 5.7 s, which nobody waits for."""
    started = time.perf_counter()
    alone, ddp, *_ = pool.run(2, measured, 2.0, 0.0, 1e-3)[0]
    assert time.perf_counter() - started < 10
    assert ddp.estimated
    assert 5.7 <= ddp.seconds < 7
    assert alone.seconds < 1


def test_what_is_said():
    rows = [advise.Advice("compute alone", 1.0, 0, {}), advise.Advice("DDP", 4.0, 10**8, {}, True)]
    options = {"exchange": "all_gather", "bytes_ratio": 100}
    for seconds, text in ((1.25, "3.2 times as fast as DDP"), (3.7, "Stay with DDP")):
        said = "\n".join(advise.describe([*rows, advise.Advice("GMC", seconds, 10**6, options)]))
        assert text in said
        assert "75 % of a step is communication" in said
        assert "100.000 MB  estimated" in said
    assert "exchange='all_gather', bytes_ratio=100)" not in said


def wrong(group):
    model, backward = make()
    found = []
    for arguments in [
        (torch.nn.parallel.DistributedDataParallel(model, process_group=group), backward),
        (torch.nn.ReLU(), backward),
        (model, lambda model: None),
        (model, backward, 0.0),
    ]:
        with pytest.raises((TypeError, ValueError)) as error:
            advise.measure(*arguments, group=group)
        found.append(str(error.value))
    return found


def test_wrong_arguments_are_named(pool):
    for said in pool.run(2, wrong):
        assert [text.partition(":")[0] for text in said] == [
            "model", "model", "backward", "seconds"
        ]  # fmt: skip


def test_one_worker_has_nothing_to_exchange():
    with pytest.raises(RuntimeError, match="start several workers with torchrun"):
        advise.measure(*make())


def command(*arguments, cwd, launcher=("-m",)):
    return subprocess.run(
        [sys.executable, *launcher, "gmc_cuda.advise", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_command(tmp_path):
    (tmp_path / "my_model.py").write_text(MODEL)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    done = command("my_model:make", "--seconds", "1", cwd=tmp_path, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:28].strip() for line in lines[1:7]] == [
        "compute alone", "DDP", *advise.CANDIDATES
    ]  # fmt: skip
    for arguments, text in ((["my_model:make"], "torchrun"), (["my_model"], "must name both")):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert text in done.stderr


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x, second):
        return self.second(self.first(x)) if second else self.first(x)


def with_an_unused_layer(group):
    rank = dist.get_rank(group)

    def backward(model):  # one worker alone uses the second layer
        x = torch.randn(4, 8, dtype=torch.bfloat16)
        model(x, second=rank == 1).square().mean().backward()

    return advise.measure(Branches(), backward, 1.0, group)


def test_layers_that_a_worker_does_not_use_and_parameters_of_two_bytes(pool):
    _, ddp, *others = pool.run(2, with_an_unused_layer)[0]
    assert ddp.link_bytes == 2 * 2 * (64 + 8)  # half of a gradient of two bytes, twice
    assert [row.method for row in others] == list(advise.CANDIDATES)
