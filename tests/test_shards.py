"""FSDP2: dense inside a node, sparse across nodes, on two nodes of two gloo workers."""

import pytest
import torch
import torch.distributed as dist
from problems import flat, mean
from processes import Processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gmc_cuda


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 21), torch.nn.Tanh(), torch.nn.Linear(21, 20), torch.nn.Linear(20, 1)
    )  # rows that do not divide by two, and one that only the first worker of a node has


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 10, generator=generator)


def mesh_of_nodes():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def full(params, shards):
    """Shards gathered inside the node, flat."""
    return flat(
        [
            DTensor.from_local(
                shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            ).full_tensor()
            for p, shard in zip(params, shards, strict=True)
        ]
    )


def aggregates(optimizer, params):
    parts = {}
    for bucket in optimizer._buckets:
        a = bucket.dense_aggregate()
        a = torch.zeros_like(bucket.memory) if a is None else a
        parts |= dict(zip(bucket.params, bucket.views(a), strict=True))
    return [parts.get(p, torch.empty_like(p.to_local())) for p in params]


def memories(optimizer, params):
    return [
        optimizer.state[p]["memory"] if p in optimizer.state else torch.empty_like(p.to_local())
        for p in params
    ]


def mass(group, density, nan_at):
    rank = dist.get_rank()
    mesh = mesh_of_nodes()
    model = network()
    fully_shard(model, mesh=mesh["shard"])
    params = list(model.parameters())
    lr = 0.1
    optimizer = gmc_cuda.GMC(params, lr=lr, density=density, process_group=mesh)
    across = mesh.get_group("replicate")
    for step in range(8):
        twin = network()
        twin.load_state_dict({n: p.full_tensor() for n, p in model.state_dict().items()})
        twin(batch(rank, step)).square().mean().backward()
        gradient = mean(dist.group.WORLD, flat([p.grad for p in twin.parameters()]))
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        if step == nan_at and rank == 3:  # seen by one shard of one node only
            params[0].grad.to_local()[0, 0] = torch.nan
        w, ubar = full(params, [p.to_local().detach() for p in params]), mean(
            across, full(params, memories(optimizer, params))
        )  # fmt: skip
        before = full(params, aggregates(optimizer, params))
        optimizer.step()
        after = full(params, [p.to_local().detach() for p in params])
        a = full(params, aggregates(optimizer, params))
        left = mean(across, full(params, memories(optimizer, params))) + a
        if step == nan_at:
            assert torch.equal(w, after) and a.count_nonzero() == 0  # all shards skip
            continue
        torch.testing.assert_close(left, ubar + gradient + 0.9 * before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after, w - lr * a, rtol=1e-6, atol=1e-6)
        assert torch.equal(after, mean(across, after))  # the same in both nodes
    assert optimizer.stats()["skipped_steps"] == (nan_at is not None)
    return optimizer.stats()["bytes_per_step"], sum(p.numel() for p in params)


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_shards_keep_the_flat_runs_mass_equation(pool, density):
    results = pool.run(4, mass, density, 4)
    if density == 0.05:  # what leaves a node, against its float32 gradients
        sent, numel = results[0][0] + results[1][0], results[0][1]
        assert sent < 0.1 * 4 * numel + 400


def saved(group):
    rank = dist.get_rank()
    mesh = mesh_of_nodes()

    def start():
        model = network()
        fully_shard(model, mesh=mesh["shard"])
        return model, gmc_cuda.GMC(model.parameters(), 0.1, density=0.05, process_group=mesh)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer, range(4))
    weights = {n: p.to_local().clone() for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    state = {**state, "state": {i: {k: v.clone() for k, v in s.items()}
                                for i, s in state["state"].items()}}  # fmt: skip
    train(model, optimizer, range(4, 8))
    other, again = start()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.to_local().copy_(weights[name])
    again.load_state_dict(state)
    train(other, again, range(4, 8))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


def test_each_workers_state_is_saved_and_loaded(pool):
    pool.run(4, saved)


def start(make=gmc_cuda.GMC):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("r", "s"))
    model = network()
    fully_shard(model, mesh=mesh["s"])
    return mesh, model, make(model.parameters(), 0.1, density=0.05, process_group=mesh)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()


def whole(tensors):
    return flat([t.full_tensor() if isinstance(t, DTensor) else t for t in tensors])


def checkpointed(group, folder, make, wait):
    """Returns what was saved, and checks that the run goes on bit for bit."""
    mesh, model, optimizer = start(make)
    train(model, optimizer, range(3))
    future = gmc_cuda.checkpoint.save(folder, model, optimizer, {"step": 3}, wait=wait)
    params = list(model.parameters())
    saved = whole(params), mean(
        mesh.get_group("r"), full(params, memories(optimizer, params))
    )  # fmt: skip
    train(model, optimizer, range(3, 6))
    future.result()
    _, other, again = start(make)
    assert gmc_cuda.checkpoint.load(folder, other, again) == {"step": 3}
    train(other, again, range(3, 6))
    assert torch.equal(whole(params), whole(list(other.parameters())))
    return saved


def one_node(say, folder):
    _, model, optimizer = start()
    gmc_cuda.checkpoint.load(folder, model, optimizer)
    params = list(model.parameters())
    return whole(params), full(params, memories(optimizer, params))


@pytest.mark.parametrize("make,wait", [(gmc_cuda.GMC, True), (gmc_cuda.GMC, False),
                                       (gmc_cuda.DGC, True)])  # fmt: skip
def test_checkpoint_of_shards(pool, tmp_path, make, wait):
    weights, unsent = pool.run(4, checkpointed, str(tmp_path / "checkpoint"), make, wait)[0]
    if make is gmc_cuda.DGC:
        return
    with Processes(2, tmp_path, one_node, str(tmp_path / "checkpoint")) as workers:
        for loaded, memory in workers.results():
            assert torch.equal(loaded, weights)
            torch.testing.assert_close(memory, unsent)


def other_shards(group, folder):
    mesh, model, optimizer = start()
    gmc_cuda.checkpoint.save(folder, model, optimizer)
    flat_model = network()
    flat_optimizer = gmc_cuda.GMC(flat_model.parameters(), 0.1)
    with pytest.raises(ValueError, match="got number of shards 2, must be 1"):
        gmc_cuda.checkpoint.load(folder, flat_model, flat_optimizer)


def test_checkpoint_of_other_shards_is_refused(pool, tmp_path):
    pool.run(4, other_shards, str(tmp_path))


def refused(group):
    mesh = mesh_of_nodes()
    model = network()
    fully_shard(model, mesh=mesh["shard"])
    with pytest.raises(ValueError, match="process_group: got None for sharded parameters"):
        gmc_cuda.GMC(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="overlap: got True, but FSDP"):
        gmc_cuda.GMC(model.parameters(), 0.1, process_group=mesh, overlap=True)
    mixed = [*model.parameters(), torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="some that are DTensors and some that are not"):
        gmc_cuda.GMC(mixed, 0.1, process_group=mesh)
    both = network()
    fully_shard(both, mesh=mesh)
    with pytest.raises(ValueError, match=r"fully_shard\(model, mesh=mesh\['shard'\]\)"):
        gmc_cuda.GMC(both.parameters(), 0.1, process_group=mesh)
    cube = init_device_mesh("cpu", (2, 2, 1))
    with pytest.raises(ValueError, match="got a mesh of 3 dimensions, must have one, or two"):
        gmc_cuda.GMC(model.parameters(), 0.1, process_group=cube)


def test_what_cannot_be_sharded_is_refused_with_the_reason(pool):
    pool.run(4, refused)


def one_dimensional(group):
    """A 1-D mesh is the group of its workers."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    models = [network(), network()]
    optimizers = [
        gmc_cuda.GMC(m.parameters(), 0.1, density=0.05, process_group=g)
        for m, g in zip(models, (mesh, None), strict=True)
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
    assert torch.equal(*(flat(list(m.parameters())) for m in models))


def test_mesh_of_one_dimension_as_process_group(pool):
    pool.run(4, one_dimensional)
