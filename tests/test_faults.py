"""A worker that dies, stops or comes too late: nothing unsent is lost, and training goes on."""

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten

import gmc_cuda
from gmc_cuda._engine import exchange
from support import restarted_training
from support.problems import aggregate_of, flat, mean, memory_of, parameters, same_on_all_ranks
from support.workers import Workers

SIZE, VICTIM = 3, 1
SURVIVORS = [rank for rank in range(SIZE) if rank != VICTIM]
FATAL = 4  # the step in which a worker is lost; the first is 1
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 0.01
LOST = re.compile(
    r"step (\d+), rank (\d) lost the group: nothing was applied, state_dict\(\) is usable; .+"
)


def build(make, overlap):
    """Three sparse buckets and one that is sent dense."""
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:5], "density": 1.0},
              {"params": params[5:]}]  # fmt: skip
    optimizer = make(
        groups, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, density=0.1, overlap=overlap,
        bucket_cap_mb=150 * 4 / 2**20,
    )  # fmt: skip
    assert len(optimizer.engine.buckets) == 4
    return params, optimizer


def noise(params, step):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return [torch.randn(p.shape, generator=generator) for p in params]


def train_a_step(params, optimizer, step):
    """The gradients come from a backward pass, as overlap=True needs it."""
    optimizer.zero_grad()
    sum((p * g).sum() for p, g in zip(params, noise(params, step), strict=True)).backward()
    optimizer.step()


def momentum_of(optimizer, params):
    return flat([optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in params])


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def at_collective(optimizer, number, do):
    """Calls do() before this worker joins in the step's collective of that number."""
    calls = []

    def before(collective):
        def call(tensor):
            calls.append(tensor)
            if len(calls) == number:
                do()
            return collective(tensor)

        return call

    group = optimizer.engine.exchange
    group.all_gather, group.all_reduce = before(group.all_gather), before(group.all_reduce)


def before_applying(optimizer, do):
    apply = optimizer.engine.round._apply

    def call(*args):
        do()
        apply(*args)

    optimizer.engine.round._apply = call


def refuse_the_second(optimizer):
    """As a backend does that reports a lost group when a collective is issued, not when waited for.

    On all ranks, so that nobody waits for a collective that others did not issue.
    """
    real, calls = exchange._all_gather, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("communicator was aborted")
        return real(*args, **kwargs)

    exchange._all_gather = fail


MOMENTS = {
    "before the step": lambda optimizer: end(),
    "before the first collective": lambda optimizer: at_collective(optimizer, 1, end),
    "between two collectives": lambda optimizer: at_collective(optimizer, 3, end),
    "while the others wait": lambda optimizer: at_collective(optimizer, 2, stop),
    "after the collectives": lambda optimizer: before_applying(optimizer, end),
    "after applying": lambda optimizer: optimizer.register_step_post_hook(lambda *_: end()),
    "issuing fails": refuse_the_second,
}


def run(say, make, overlap, moment=None, disturbed=(VICTIM,), steps=FATAL + 2):
    """Trains until the group is lost. Returns what was seen at each step, and the error."""
    params, optimizer = build(make, overlap)
    seen = []
    for step in range(1, steps + 1):
        if step == FATAL and dist.get_rank() in disturbed and moment is not None:
            MOMENTS[moment](optimizer)
        seen.append(
            {
                "w": flat(params),
                "u": memory_of(optimizer, params),
                "a": aggregate_of(optimizer, params),
                "m": momentum_of(optimizer, params),
            }
        )
        try:
            train_a_step(params, optimizer, step)
        except RuntimeError as error:
            return seen, check_lost(params, optimizer, seen, error)
    return seen, None


def check_lost(params, optimizer, seen, error):
    """The step added its gradient to memory and did nothing else; then the survivors go on."""
    words = LOST.fullmatch(str(error))
    assert words, str(error)
    assert isinstance(error.__cause__.__cause__, RuntimeError), "gloo's own words are kept"
    assert str(error.__cause__.__cause__) in str(error)
    step, rank = len(seen), dist.get_rank()
    assert (int(words[1]), int(words[2])) == (step, rank)
    w, u, a, m = (seen[-1][key] for key in "wuam")
    assert torch.equal(flat(params), w)
    came_in = flat(noise(params, step)) + WEIGHT_DECAY * w
    if isinstance(optimizer, gmc_cuda.DGC):
        m = MOMENTUM * m + came_in
        torch.testing.assert_close(momentum_of(optimizer, params), m, rtol=1e-6, atol=1e-6)
        v = u + m
    else:
        v = u + came_in + MOMENTUM * a
    torch.testing.assert_close(memory_of(optimizer, params), v, rtol=1e-6, atol=1e-6)
    assert aggregate_of(optimizer, params).count_nonzero() == 0
    assert optimizer.stats()["steps"] == optimizer.stats()["skipped_steps"] + step - 1 == step
    return step, go_on_without_the_victim(params, optimizer)


def go_on_without_the_victim(params, optimizer):
    """The survivors' state, as saved, in new optimizers and a group of their own."""
    saved = optimizer.state_dict()
    kept = memory_of(optimizer, params)
    store = dist.distributed_c10d._get_default_store()
    rank = SURVIVORS.index(dist.get_rank()) if dist.get_rank() != VICTIM else None
    dist.destroy_process_group()
    if rank is None:
        return None
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=len(SURVIVORS),
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    resumed, optimizer = build(type(optimizer), optimizer.overlap)
    for new, old in zip(resumed, params, strict=True):
        new.data.copy_(old)
    with pytest.warns(UserWarning, match="the state was saved by rank"):
        optimizer.load_state_dict(saved)
    assert torch.equal(memory_of(optimizer, resumed), kept)
    equal = same_on_all_ranks(None, resumed)  # not if only one of them had made the last step
    if equal and isinstance(optimizer, gmc_cuda.GMC):
        w, ubar = flat(resumed), mean(None, kept)
        train_a_step(resumed, optimizer, 50)
        a = aggregate_of(optimizer, resumed)
        came_in = mean(None, flat(noise(resumed, 50))) + WEIGHT_DECAY * w
        ubar_next = mean(None, memory_of(optimizer, resumed))
        torch.testing.assert_close(ubar_next + a, ubar + came_in, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flat(resumed), w - LR * a, rtol=1e-6, atol=1e-6)
        assert same_on_all_ranks(None, resumed)
        assert a.any()
    return equal


CASES = [(gmc_cuda.GMC, False), (gmc_cuda.GMC, True), (gmc_cuda.DGC, False)]
_undisturbed = {}


@pytest.fixture
def undisturbed(request, tmp_path_factory):
    """What each rank sees at each step of the run that nothing happens to."""
    make, overlap = (request.getfixturevalue(name) for name in ("make", "overlap"))
    if (make, overlap) not in _undisturbed:
        with Workers(SIZE, tmp_path_factory.mktemp("run"), run, make, overlap) as workers:
            _undisturbed[make, overlap] = [seen for seen, _ in workers.results()]
    return _undisturbed[make, overlap]


def assert_same(seen, expected):
    for now, then in zip(seen, expected, strict=False):
        for key in now:
            assert torch.equal(now[key], then[key]), key


@pytest.mark.parametrize("make,overlap", CASES)
@pytest.mark.parametrize("moment", list(MOMENTS)[:-1])
def test_a_killed_worker(tmp_path, undisturbed, make, overlap, moment):
    with Workers(SIZE, tmp_path, run, make, overlap, moment) as workers:
        if moment == "while the others wait":
            workers.wait_until_stopped(VICTIM)
            with pytest.raises(AssertionError, match="says nothing"):
                workers.hear(SURVIVORS[0], patience=0.3)
            workers.send_signal(VICTIM, signal.SIGKILL)
        with pytest.raises(EOFError):
            workers.hear(VICTIM)
        results = workers.results(SURVIVORS)
    for rank, (seen, (step, _)) in zip(SURVIVORS, results, strict=True):
        assert_same(seen, undisturbed[rank])
        # What the dead worker had handed to the kernel may or may not arrive.
        possible = {
            "after the collectives": (FATAL, FATAL + 1),
            "after applying": (FATAL, FATAL + 1),
        }
        assert step in possible.get(moment, (FATAL,))
    if moment not in ("after the collectives", "after applying"):
        assert all(went_on for _, (_, went_on) in results)


@pytest.mark.parametrize("make,overlap", CASES[:2])
def test_a_paused_worker_only_delays(tmp_path, undisturbed, make, overlap):
    moment = "while the others wait"
    with Workers(SIZE, tmp_path, run, make, overlap, moment) as workers:
        workers.wait_until_stopped(VICTIM)
        with pytest.raises(AssertionError, match="says nothing"):
            workers.hear(SURVIVORS[0], patience=0.5)
        workers.send_signal(VICTIM, signal.SIGCONT)
        for rank, (seen, error) in enumerate(workers.results()):
            assert error is None
            assert len(seen) == FATAL + 2
            assert_same(seen, undisturbed[rank])


@pytest.mark.parametrize("make,overlap", CASES[:2])
def test_a_worker_that_comes_too_late(tmp_path, undisturbed, make, overlap):
    """Past the group's time-out all ranks raise, the late one too."""
    moment = "while the others wait"
    with Workers(SIZE, tmp_path, run, make, overlap, moment, seconds=1.0) as workers:
        workers.wait_until_stopped(VICTIM)
        results = dict(zip(SURVIVORS, workers.results(SURVIVORS), strict=True))
        workers.send_signal(VICTIM, signal.SIGCONT)
        results[VICTIM] = workers.hear(VICTIM)
    for rank, (seen, (step, went_on)) in results.items():
        assert step == FATAL
        assert went_on or rank == VICTIM
        assert_same(seen, undisturbed[rank])


@pytest.mark.parametrize("make,overlap", CASES)
def test_a_group_that_fails_when_a_collective_is_issued(tmp_path, undisturbed, make, overlap):
    """The buckets that come after it take in their gradients too."""
    arguments = (make, overlap, "issuing fails", range(SIZE))
    with Workers(SIZE, tmp_path, run, *arguments) as workers:
        for rank, (seen, (step, went_on)) in enumerate(workers.results()):
            assert step == FATAL
            assert went_on or rank == VICTIM
            assert_same(seen, undisturbed[rank])


# ------------------------------------------------------------------- outside the exchange of a step


def average_and_lose(say, make):
    params, optimizer = build(make, overlap=False)
    for step in range(1, 4):
        train_a_step(params, optimizer, step)
    before = memory_of(optimizer, params), momentum_of(optimizer, params)
    if dist.get_rank() == VICTIM:
        at_collective(optimizer, 3, end)
    words = rf"step 3, rank {dist.get_rank()} lost the group: memory was not averaged, state_dict"
    with pytest.raises(RuntimeError, match=words):
        optimizer.average_memory_()
    after = memory_of(optimizer, params), momentum_of(optimizer, params)
    assert not optimizer.state_dict()["param_groups"][0]["saved_by"]["averaged"]
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_a_worker_killed_while_memory_is_averaged(tmp_path, make):
    with Workers(SIZE, tmp_path, average_and_lose, make) as workers:
        assert workers.results(SURVIVORS) == [True, True]


def check_and_lose(say):
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR, density=0.1, check_replicas_every=2)
    train_a_step(params, optimizer, 1)
    before = flat(params)
    if dist.get_rank() == VICTIM:
        at_collective(optimizer, len(optimizer.engine.buckets) + 1, end)
    words = rf"step 2, rank {dist.get_rank()} lost the group: the step was applied here, state_d"
    with pytest.raises(RuntimeError, match=words):
        train_a_step(params, optimizer, 2)
    return not torch.equal(flat(params), before)


def test_a_worker_killed_while_replicas_are_compared(tmp_path):
    with Workers(SIZE, tmp_path, check_and_lose) as workers:
        assert workers.results(SURVIVORS) == [True, True]


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_an_interrupt_while_waiting(monkeypatch, density):
    """Ctrl-C, after which many save what they have: the step's gradient is in memory."""
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=LR, momentum=MOMENTUM, density=density)
    train = [torch.randn_like(flat(params)).float() for _ in range(2)]

    def step(gradient):
        parts = gradient.split([p.numel() for p in params])
        for param, part in zip(params, parts, strict=True):
            param.grad = part.view_as(param)
        optimizer.step()

    step(train[0])
    w, u, a = flat(params), memory_of(optimizer, params), aggregate_of(optimizer, params)

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exchange.Work, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(train[1])
    assert torch.equal(flat(params), w)
    assert aggregate_of(optimizer, params).count_nonzero() == 0
    v = u + train[1] + MOMENTUM * a
    torch.testing.assert_close(memory_of(optimizer, params), v, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- restarting


def save_and_lose(say, folder):
    """The victim dies while the others save; what was there before can be loaded."""
    model = torch.nn.Linear(9, 4)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)
    gmc_cuda.checkpoint.save(folder, model, optimizer, "before")
    if dist.get_rank() == VICTIM:
        end()
    with pytest.raises(RuntimeError) as caught:
        gmc_cuda.checkpoint.save(folder, model, optimizer, "after")
    return str(caught.value)


def test_a_worker_killed_before_the_others_save(tmp_path):
    folder = tmp_path / "checkpoint"
    with Workers(SIZE, tmp_path, save_and_lose, str(folder), seconds=10) as workers:
        for words in workers.results(SURVIVORS):
            assert f"all workers must call checkpoint.save, but rank {VICTIM} did not" in words
    part = folder / (folder / "current").read_text()
    assert torch.load(part / "facts.pt", weights_only=True)["extra"] == "before"


def undisturbed_training(say, folder):
    return restarted_training.train(Path(folder), None)


def assert_same_bits(values, expected):
    (values, form), (expected, expected_form) = tree_flatten(values), tree_flatten(expected)
    assert form == expected_form
    for value, other in zip(values, expected, strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.slow
def test_torchrun_restarts_go_on_exactly(tmp_path):
    """Two deaths, one of them in the middle of a file: the same bits as without."""
    runs = tmp_path / "restarted", tmp_path / "undisturbed"
    for folder in runs:
        folder.mkdir()
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Else a restarted worker finds the addresses of the one before in the store.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=2", restarted_training.__file__, str(runs[0])],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    starts = re.findall(r"life (\d) starts at \((\d+), (\d+)\)", done.stdout)
    # Only rank 0 had written step 6 when life 1 began, and only rank 1 step 10 when life 2 did.
    assert starts == [("0", "0", "0"), ("1", "4", "4"), ("2", "8", "8")], done.stdout
    with Workers(2, tmp_path, undisturbed_training, str(runs[1])) as workers:
        for rank, expected in enumerate(workers.results()):
            ends = torch.load(runs[0] / f"end-{rank}.pt", weights_only=True)
            assert_same_bits(ends, expected)
            assert all(end["optimizer"]["state"][0]["memory"].any() for end in ends)
