"""Calls that all workers must make: one worker alone gets an error, and the others go on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter

import gmc_cuda
from gmc_cuda._engine import meeting
from gmc_cuda._engine.exchange import Exchange
from support.problems import flat, memory_of, parameters, same_on_all_ranks, set_gradients
from support.workers import Workers

SECONDS = 0.5  # that a worker waits where another does not come


def local_updates(params):
    inner = torch.optim.SGD(params, lr=0.1)
    return gmc_cuda.LocalUpdates(inner, lambda copies: gmc_cuda.GMC(copies, 0.7), every=3)


def node_average(params):
    def make(groups, process_group):
        return gmc_cuda.GMC(groups, 0.1, density=0.1, process_group=process_group)

    return gmc_cuda.NodeAverage(params, make, init_device_mesh("cpu", (2, 1)))


def gmc(params):
    return gmc_cuda.GMC(params, lr=0.1, density=0.1)


def add(optimizer):
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})


def buffers(optimizer):
    model = torch.nn.BatchNorm1d(3)
    gmc_cuda.broadcast_buffers(model, optimizer.process_group)


CALLS = {
    "average_memory_()": (gmc, lambda optimizer: optimizer.average_memory_()),
    "average_memory_() of an outer optimizer": (local_updates, lambda o: o.average_memory_()),
    "average_memory_() across nodes": (node_average, lambda o: o.average_memory_()),
    "synchronize()": (local_updates, lambda optimizer: optimizer.synchronize()),
    "add_param_group()": (gmc, add),
    "add_param_group() of an inner optimizer": (local_updates, add),
    "add_param_group() across nodes": (node_average, add),
    "the constructor of GMC": (gmc, lambda optimizer: gmc(parameters())),
    "the constructor of NodeAverage": (node_average, lambda optimizer: node_average(parameters())),
    "broadcast_buffers()": (gmc, buffers),
}


def alone(say, name, rank):
    make, call = CALLS[name]
    params = parameters()
    optimizer = make(params)

    def train(step):
        # One that was added has no gradient.
        set_gradients(params, dist.get_rank(), step)
        optimizer.step()

    train(0)
    if dist.get_rank() == rank:
        before = flat(params), [dict(g) for g in optimizer.param_groups]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meeting, "timeout_of", lambda group: SECONDS)
            start = time.monotonic()
            what = name.partition(" of an ")[0].partition(" across ")[0]
            with pytest.raises(RuntimeError) as caught:
                call(optimizer)
        waited = time.monotonic() - start
        words = str(caught.value)
        told = f"all workers must call {what}, but rank {1 - rank} did not within 0.5 s"
        assert told in words, words
        assert SECONDS <= waited < 20
        assert torch.equal(flat(params), before[0])
        assert [dict(g) for g in optimizer.param_groups] == before[1]
        dist.barrier()
    else:
        dist.barrier()  # a collective that is not the one the other calls
    train(1)
    call(optimizer)
    train(2)
    call(optimizer)
    getattr(optimizer, "synchronize", lambda: None)()
    assert same_on_all_ranks(None, params)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_one_worker_alone(tmp_path, name):
    rank = list(CALLS).index(name) % 2
    with Workers(2, tmp_path, alone, name, rank) as workers:
        workers.results()


def copy_without_a_group(group):
    """A copy from another process must not fall back to all workers, who do not come."""
    import pickle

    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=0.1, process_group=group)
    set_gradients(params, dist.get_rank(group), 0)
    optimizer.step()
    again, others = pickle.loads(pickle.dumps((optimizer, params)))
    with pytest.raises(RuntimeError, match="set optimizer.process_group = group"):
        again.average_memory_()
    again.process_group = group
    optimizer.average_memory_()
    again.average_memory_()
    assert torch.equal(memory_of(optimizer, params), memory_of(again, others))


def test_a_copy_without_its_group_is_refused(pool):
    pool.run(2, copy_without_a_group)


# ------------------------------------------------------------------- the gates, without processes


def stores(kind, folder, size):
    if kind == "hash":
        return [dist.HashStore()] * size
    if kind == "file":
        return [dist.FileStore(str(folder / "file"), size) for _ in range(size)]
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = [dist.TCPStore("127.0.0.1", first.port) for _ in range(size - 1)]
    return [first, *others]


def places(kind, folder, size=3):
    return [
        meeting._Place(dist.PrefixStore("group", store), "here", SimpleNamespace(rank=r, size=size))
        for r, store in enumerate(stores(kind, folder, size))
    ]


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_workers_meet_again_and_again(tmp_path, kind):
    """Nobody leaves before all have come; entries of meetings that are over are deleted."""
    workers = places(kind, tmp_path)
    came = [0] * len(workers)

    def work(rank):
        for number in range(1, 41):
            if (number * 7 + rank) % 5 == 0:
                time.sleep(0.003)
            came[rank] = number
            assert workers[rank].missing(60.0) == []
            assert min(came) >= number

    with ThreadPoolExecutor(len(workers)) as threads:
        list(threads.map(work, range(len(workers))))
    if kind == "hash":  # one gate and one before it, with the number
        assert workers[0]._store.underlying_store.num_keys() <= 2 * (len(workers) + 2) + 1


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_those_who_came_in_time_hear_the_same(tmp_path, kind):
    workers = places(kind, tmp_path)
    heard = {}

    def work(rank, seconds):
        heard[rank] = workers[rank].missing(seconds)

    threads = [threading.Thread(target=work, args=(r, s)) for r, s in ((0, 0.4), (2, 60.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {0: [1], 2: [1]}
    assert workers[1].missing(0.1) == [0, 2]  # the one that is late waits for the next meeting
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda worker: worker.missing(60.0), workers)) == [[], [], []]


def test_one_that_was_interrupted_comes_again(tmp_path, monkeypatch):
    workers = places("hash", tmp_path, size=2)

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(meeting.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            workers[0].missing(60.0)
    assert workers[0].missing(0.05) == [1]  # it is not counted twice
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda worker: worker.missing(60.0), workers)) == [[], []]


def test_one_worker_meets_nobody():
    meeting.meet(Exchange(None), "anything")
