"""Parameters sharded inside a node, sparse across nodes, on two nodes of two gloo workers."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gmc_cuda
from support.meshes import mesh_of
from support.problems import flat, mean, same_on_all_ranks
from support.workers import Workers


def network(width=21):
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(10, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 20),
        torch.nn.Linear(20, 1),
    )  # rows that do not divide by two, and one that only the first worker of a node has


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 10, generator=generator)


def mesh_of_nodes():
    return mesh_of((2, 2), ("replicate", "shard"))


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
    for bucket in optimizer.engine.buckets:
        a = bucket.dense_aggregate()
        a = torch.zeros_like(bucket.memory) if a is None else a
        parts |= dict(zip(bucket.params, bucket.views(a), strict=True))
    return [parts.get(p, torch.empty_like(p.to_local())) for p in params]


def memories(optimizer, params):
    """What each has not sent on; what it owns for both nodes counts twice in their mean."""
    found = []
    for p in params:
        state = optimizer.state.get(p, {})
        own = state.get("memory", torch.zeros_like(p.to_local()))
        found.append(own + 2 * state.get("owner_memory", torch.zeros_like(own)))
    return found


def mass(group, density, nan_at, way):
    rank = dist.get_rank()
    mesh = mesh_of_nodes()
    model = network()
    fully_shard(model, mesh=mesh["shard"])
    params = list(model.parameters())
    lr = 0.1
    optimizer = gmc_cuda.GMC(params, lr=lr, density=density, process_group=mesh, exchange=way)
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
            assert torch.equal(w, after)
            assert a.count_nonzero() == 0
            continue
        torch.testing.assert_close(left, ubar + gradient + 0.9 * before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after, w - lr * a, rtol=1e-6, atol=1e-6)
        assert torch.equal(after, mean(across, after))  # the same in both nodes
    assert optimizer.stats()["skipped_steps"] == (nan_at is not None)
    return optimizer.stats()["bytes_per_step"], sum(p.numel() for p in params)


@pytest.mark.parametrize(
    "density,way", [(0.05, "all_gather"), (1.0, "all_gather"), (0.05, "reduce_scatter")]
)
def test_shards_keep_the_flat_runs_mass_equation(pool, density, way):
    results = pool.run(4, mass, density, 4, way)
    if (density, way) == (0.05, "all_gather"):  # what leaves a node, against its float32 gradients
        sent, numel = results[0][0] + results[1][0], results[0][1]
        assert sent < 0.1 * 4 * numel + 400


def owned_by_some(group):
    """Two-sided: of the last layer only one worker of a node has a shard."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 400), torch.nn.Linear(400, 1))
    mesh = mesh_of_nodes()
    fully_shard(model[-1], mesh=mesh["shard"])
    optimizer = gmc_cuda.GMC(
        model[-1].parameters(), lr=0.1, process_group=mesh, exchange="reduce_scatter"
    )
    for step in range(3):
        optimizer.zero_grad()
        model(batch(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
    return optimizer.stats()["steps"], optimizer.stats()["link_bytes_sent"]


def test_workers_whose_shards_are_empty(pool):
    found = pool.run(4, owned_by_some)
    assert [steps for steps, _ in found] == [3] * 4
    assert [sent > 0 for _, sent in found] == [True, False, True, False]
    assert found[0][1] < 4 * 401 / 2, "it was sent sparsely"


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
    mesh = mesh_of((dist.get_world_size() // 2, 2), ("r", "s"))
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
    params = list(model.parameters())
    optimizer.state[params[0]]["ema"] = (params[0] * 2).detach()
    future = gmc_cuda.checkpoint.save(folder, model, optimizer, {"step": 3}, wait=wait)
    saved = whole(params), mean(
        mesh.get_group("r"), full(params, memories(optimizer, params))
    )  # fmt: skip
    train(model, optimizer, range(3, 6))
    future.result()
    _, other, again = start(make)
    assert gmc_cuda.checkpoint.load(folder, other, again) == {"step": 3}
    train(other, again, range(3, 6))
    assert torch.equal(whole(params), whole(list(other.parameters())))
    ema = [o.state[next(m.parameters())]["ema"] for m, o in ((model, optimizer), (other, again))]
    assert torch.equal(whole(ema[:1]), whole(ema[1:]))
    assert ema[0].placements == ema[1].placements
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
    with Workers(2, tmp_path, one_node, str(tmp_path / "checkpoint")) as workers:
        for loaded, memory in workers.results():
            assert torch.equal(loaded, weights)
            torch.testing.assert_close(memory, unsent)


def other_shards(group, folder):
    _mesh, model, optimizer = start()
    gmc_cuda.checkpoint.save(folder, model, optimizer)
    flat_model = network()
    flat_optimizer = gmc_cuda.GMC(flat_model.parameters(), 0.1)
    with pytest.raises(ValueError, match="got number of shards 2, must be 1"):
        gmc_cuda.checkpoint.load(folder, flat_model, flat_optimizer)


def test_checkpoint_of_other_shards_is_refused(pool, tmp_path):
    pool.run(4, other_shards, str(tmp_path))


def refused_of_shard_0(group, load, optimizer):
    """Asserts that only workers with the same shard load shard 0's state, without a warning."""
    if dist.get_rank(group) % 2 == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load()
        return
    before = [t.clone() for s in optimizer.state.values() for t in s.values()]
    with pytest.raises(ValueError) as error:
        load()
    assert str(error.value) == (
        "state_dict: got that of shard 0 of 2, must be of shard 1 of 2: each worker of a node "
        "holds another shard of the parameters, and of memory and momentum. Let each worker save "
        "and load its own state, or use gmc_cuda.checkpoint; torch.distributed.checkpoint keeps "
        "only one shard's"
    )
    assert optimizer.param_groups[0]["lr"] == 0.1
    for a, b in zip(before, (t for s in optimizer.state.values() for t in s.values()), strict=True):
        assert torch.equal(a, b)


def of_another_shard(group, folder):
    def start():
        mesh = mesh_of_nodes()
        model = network(20)[:3]  # all shards have one shape
        fully_shard(model, mesh=mesh["shard"])
        return model, gmc_cuda.GMC(model.parameters(), 0.1, density=0.05, process_group=mesh)

    model, optimizer = start()
    train(model, optimizer, range(2))
    optimizer.average_memory_()
    optimizer.param_groups[0]["lr"] = 0.2
    states = [None] * 4
    dist.all_gather_object(states, optimizer.state_dict(), group)
    state = states[0]
    other, again = start()
    refused_of_shard_0(group, lambda: again.load_state_dict(state), again)
    for saved in state["param_groups"]:  # as states were before they said of which shard they are
        del saved["saved_by"]["shard"], saved["saved_by"]["shards"]
    again.load_state_dict(state)

    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    other, again = start()
    loaded = {"optimizer": get_optimizer_state_dict(other, again)}
    dcp.load(loaded, checkpoint_id=folder)
    refused_of_shard_0(
        group, lambda: set_optimizer_state_dict(other, again, loaded["optimizer"]), again
    )

    plain = network(20)[:3]
    alone = gmc_cuda.GMC(plain.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"shard \d of 2, must be of parameters that are not"):
        alone.load_state_dict(optimizer.state_dict())


def test_the_state_of_another_shard_is_refused(pool, tmp_path):
    pool.run(4, of_another_shard, str(tmp_path))


def of_replicas(group):
    """Tensor parallelism: what is whole on each worker of a node has the same state there."""
    mesh, model = parallel()
    whole = [p for p in model.parameters() if p.placements[0].is_replicate()]
    optimizer = gmc_cuda.GMC(whole, 0.1, density=0.5, process_group=mesh)
    model(batch(mesh.get_local_rank("replicate"), 0)).square().mean().backward()
    optimizer.step()
    optimizer.average_memory_()
    states = [None] * 4
    dist.all_gather_object(states, optimizer.state_dict(), group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(states[0])


def test_the_state_of_replicas_is_anyones(pool):
    pool.run(4, of_replicas)


HAND_OVER = (
    "shard inside the node only, and hand the whole mesh to the optimizer:\n"
    "    fully_shard(model, mesh=mesh['shard'])\n"
    "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
)


def raises(text, params, group, **options):
    with pytest.raises(ValueError) as error:
        gmc_cuda.GMC(params, 0.1, process_group=group, **options)
    assert str(error.value) == text


def refused(group):
    mesh = mesh_of_nodes()
    model = network()
    fully_shard(model, mesh=mesh["shard"])
    raises(
        "process_group: got None for sharded parameters, must say which workers hold the same "
        "shard: process_group=mesh, with mesh = init_device_mesh(device, (nodes, workers in a "
        "node), mesh_dim_names=('replicate', 'shard')). A model that is sharded over all "
        "workers has no replicas, so there is nothing to compress",
        model.parameters(), None,
    )  # fmt: skip
    raises("overlap: got True, but FSDP announces no gradients to hooks: use overlap=False",
           model.parameters(), mesh, overlap=True)  # fmt: skip
    raises(
        "params: got some that are DTensors and some that are not; shard all of them (fully_shard "
        "on the whole model), or use an optimizer for each kind",
        [*model.parameters(), torch.nn.Parameter(torch.zeros(3))], mesh,
    )  # fmt: skip
    both = network()
    fully_shard(both, mesh=mesh)
    for given in (mesh, mesh["replicate"], None):  # FSDP2 averages across nodes by itself
        raises(
            "params: got DTensors with placements (Replicate(), Shard(dim=0)). Where a parameter "
            f"is replicated, its gradient is averaged before this optimizer sees it: {HAND_OVER}",
            both.parameters(), given,
        )  # fmt: skip
    everywhere = network()
    fully_shard(everywhere)
    hand_over = HAND_OVER.replace("mesh to", "mesh, (nodes, workers in a node), to")
    differing = "some of which hold different shards of a parameter, must be those that hold the"
    raises(f"process_group: got ranks [0, 1, 2, 3], {differing} same: {hand_over}",
           everywhere.parameters(), dist.group.WORLD)  # fmt: skip
    swapped = sorted(dist.get_process_group_ranks(mesh.get_group("shard")))
    raises(f"process_group: got ranks {swapped}, {differing} same: {hand_over}",
           model.parameters(), mesh["shard"])  # fmt: skip
    raises(
        "process_group: got a mesh of two dimensions for parameters that are not sharded, of which "
        "the workers of a node would then have different ones. Shard them:\n"
        "    fully_shard(model, mesh=mesh[mesh.mesh_dim_names[1]])\n"
        "or, where every worker has the whole model, use\n"
        "    gmc_cuda.NodeAverage(model.parameters(), make, mesh)\n"
        "For shards of your own, process_group=mesh.get_group(0)",
        network().parameters(), mesh,
    )  # fmt: skip
    cube = mesh_of((2, 2, 1))
    raises("process_group: got a mesh of 3 dimensions, must have one, or two: across nodes, then "
           "inside a node", model.parameters(), cube)  # fmt: skip


def test_what_cannot_be_sharded_is_refused_with_the_reason(pool):
    pool.run(4, refused)


def other_group(group):
    """A new process_group is checked as the constructor's is, and changes nothing if refused."""
    mesh = mesh_of_nodes()
    model = network()
    fully_shard(model, mesh=mesh["shard"])
    optimizer = gmc_cuda.GMC(model.parameters(), 0.1, process_group=mesh)
    before = optimizer.process_group
    for other in (None, dist.group.WORLD, mesh["shard"]):
        with pytest.raises(ValueError, match="process_group: got "):
            optimizer.process_group = other
    assert optimizer.process_group is before
    optimizer.process_group = mesh
    train(model, optimizer, range(2))


def test_a_new_process_group_is_checked_as_the_first(pool):
    pool.run(4, other_group)


def one_shard_differs(group, way):
    """Every worker raises, whichever shard it has, and names the workers that differ."""
    mesh, rank = mesh_of_nodes(), dist.get_rank()
    options = {"lr": 0.1, "density": 0.1, "check_replicas_every": 1, "nonfinite": "raise"}
    model = network()
    if way == "NodeAverage":
        make = functools.partial(gmc_cuda.GMC, **options)
        optimizer = gmc_cuda.NodeAverage(model.parameters(), make, mesh)
    else:
        fully_shard(model, mesh=mesh["shard"])
        optimizer = gmc_cuda.GMC(model.parameters(), process_group=mesh, **options)

    def local(tensor):
        return tensor if way == "NodeAverage" else tensor.to_local()

    def backward():
        optimizer.zero_grad()
        model(batch(rank, 0)).square().mean().backward()

    def step():
        backward()
        optimizer.step()

    for _ in range(2):
        step()
    backward()
    for p in model.parameters():
        if rank == 3:
            local(p.grad).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"on rank [23]|hold other shards"):
        optimizer.step()
    step()
    if rank == 3:
        with torch.no_grad():
            for p in model.parameters():
                local(p).add_(1.0)
    with pytest.raises(RuntimeError, match="replicas differ after step 5") as raised:
        step()
    return str(raised.value)


@pytest.mark.parametrize("way", ["NodeAverage", "FSDP2"])
def test_replicas_that_differ_in_one_shard_raise_on_every_worker(pool, way):
    said = pool.run(4, one_shard_differs, way)
    assert any("on rank 3 than on rank 1" in text for text in said)


# ------------------------------------------------------------- tensor parallelism, FSDP's version 1


def as_dense_sgd(model, twin, optimizers, rank, size, whole):
    """The run's parameters are those of one process that sees all `size` batches of a step."""
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        sgd.zero_grad()
        losses = [twin(batch(r, step)).square().mean() for r in range(size)]
        (sum(losses) / size).backward()
        sgd.step()
    for p, expected in zip(whole(model), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected.detach(), rtol=1e-5, atol=1e-6)


def parallel():
    """Split by columns and by rows; of the latter, biases are whole on each worker."""
    mesh = mesh_of_nodes()
    model = network(22)  # tensor parallelism needs a width that two workers can share
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(),
        "3": RowwiseParallel(input_layouts=Replicate()),
    }
    return mesh, parallelize_module(model, mesh["shard"], plan)


def tensor_parallel(group, density):
    mesh, model = parallel()
    node = mesh.get_local_rank("replicate")
    whole = [p for p in model.parameters() if p.placements[0].is_replicate()]
    split = [p for p in model.parameters() if not p.placements[0].is_replicate()]
    assert whole
    assert split
    raises(
        "params: got DTensors of which some are sharded and some replicated inside the node, as "
        "in tensor parallelism. What is sent of a parameter depends on the others in its bucket, "
        "so the replicas would drift apart: give the replicated ones an optimizer of their own:\n"
        "    whole = [p for p in model.parameters() if p.placements[0].is_replicate()]\n"
        "    gmc_cuda.GMC(whole, lr, process_group=mesh)",
        model.parameters(), mesh,
    )  # fmt: skip
    optimizers = [
        gmc_cuda.GMC(params, 0.1, density=density, process_group=mesh) for params in (whole, split)
    ]
    if density == 1:
        gathered = lambda model: [p.full_tensor() for p in model.parameters()]  # noqa: E731
        as_dense_sgd(model, network(22), optimizers, node, 2, gathered)
    else:
        for step in range(5):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(batch(node, step)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        assert same_on_all_ranks(group, [p.to_local() for p in whole])
        across = mesh.get_group("replicate")
        assert same_on_all_ranks(across, [p.to_local() for p in split])


@pytest.mark.parametrize("density", [1.0, 0.05])
def test_tensor_parallel_shards(pool, density):
    pool.run(4, tensor_parallel, density)


def partial_gradient(group):
    """A gradient that is not split as its parameter is made so."""
    mesh = mesh_of_nodes()["shard"]
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    part = torch.ones(4, 3) * (1 + mesh.get_local_rank())
    param.grad = DTensor.from_local(part, mesh, [Partial()])
    optimizer = gmc_cuda.GMC([param], 1.0, density=1.0, process_group=mesh_of_nodes())
    optimizer.step()
    assert torch.equal(param.to_local(), torch.full((2, 3), -3.0))


def test_gradient_of_other_placements(pool):
    pool.run(4, partial_gradient)


def two_ways(group):
    mesh, model = parallel()
    fully_shard(model, mesh=mesh["replicate"])
    placements = next(iter(model.parameters())).placements
    raises(
        f"params: got DTensors with placements {placements}, must be sharded over one dimension of "
        "a mesh: by FSDP or by tensor parallelism, not by both",
        [p for p in model.parameters() if not any(q.is_replicate() for q in p.placements)], mesh,
    )  # fmt: skip


def test_shards_of_shards_are_refused(pool):
    pool.run(4, two_ways)


def fsdp1(strategy, mesh, **options):
    hybrid = strategy == ShardingStrategy.HYBRID_SHARD
    inside = mesh.get_group("shard")
    return FullyShardedDataParallel(
        network(),
        process_group=(inside, mesh.get_group("replicate")) if hybrid else inside,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
        **options,
    )


def summoned(model):
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in model.parameters()]


def first_version(group, strategy):
    mesh, rank = mesh_of_nodes(), dist.get_rank()
    model = fsdp1(strategy, mesh, use_orig_params=True)
    optimizer = gmc_cuda.GMC(model.parameters(), 0.1, density=1.0, process_group=mesh)
    as_dense_sgd(model, network(), [optimizer], rank, 4, summoned)
    model = fsdp1(strategy, mesh, use_orig_params=True)
    across = mesh.get_group("replicate")  # FSDP says itself who is inside the node
    optimizer = gmc_cuda.GMC(model.parameters(), 0.1, density=0.05, process_group=across)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        if step == 2 and rank == 3:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.nan
        optimizer.step()
    assert optimizer.stats()["skipped_steps"] == 1  # in all shards
    assert same_on_all_ranks(group, summoned(model))
    assert 0 < optimizer.stats()["bytes_per_step"] < 0.15 * 4 * 350 + 100


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_fsdp_version_1(pool, strategy):
    pool.run(4, first_version, ShardingStrategy[strategy])


def first_version_refused(group):
    mesh = mesh_of_nodes()
    model = fsdp1(ShardingStrategy.FULL_SHARD, mesh, use_orig_params=True)
    raises("overlap: got True, but FSDP announces no gradients to hooks: use overlap=False",
           model.parameters(), mesh, overlap=True)  # fmt: skip
    with pytest.raises(ValueError, match="process_group: got None for sharded parameters"):
        gmc_cuda.GMC(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="some of which hold different shards of a parameter"):
        gmc_cuda.GMC(model.parameters(), 0.1, process_group=group)
    hybrid = fsdp1(ShardingStrategy.HYBRID_SHARD, mesh, use_orig_params=True)
    raises(
        "params: got parameters of FullyShardedDataParallel with HYBRID_SHARD, which averages "
        "gradients between replicas before this optimizer sees them: shard inside the node only, "
        "and hand the whole mesh to the optimizer:\n"
        "    FullyShardedDataParallel(model, process_group=mesh.get_group('shard'), "
        "use_orig_params=True)\n"
        "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)",
        hybrid.parameters(), mesh,
    )  # fmt: skip
    optimizer = gmc_cuda.GMC(model.parameters(), 0.1, process_group=mesh)
    with pytest.raises(TypeError) as error:
        gmc_cuda.checkpoint.save("never", model, optimizer)
    assert str(error.value) == (
        "optimizer: got parameters of FullyShardedDataParallel, whose parts say nothing of the "
        "whole, must be FSDP2's (fully_shard). Let each worker save and load its own state:\n"
        "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
    )


def test_fsdp_version_1_refused(pool):
    pool.run(4, first_version_refused)


def one_dimensional(group):
    """A 1-D mesh is the group of its workers."""
    rank = dist.get_rank()
    mesh = mesh_of((4,))
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


def clipped(group, stack, clip_norm):
    """One dense step without momentum: w moves by the mean of the nodes' clipped gradients."""
    rank, mesh = dist.get_rank(), mesh_of_nodes()
    make = functools.partial(
        gmc_cuda.DGC, lr=1.0, momentum=0.0, density=1.0, momentum_masking=False, clip_norm=clip_norm
    )
    model, twin = network(), network()
    if stack == "FSDP2":
        fully_shard(model, mesh=mesh["shard"])
        optimizer = make(model.parameters(), process_group=mesh)
    else:
        optimizer = gmc_cuda.NodeAverage(model.parameters(), make, mesh)
    began = whole(model.parameters())
    twin(batch(rank, 0)).square().mean().backward()
    of_node = mean(mesh.get_group("shard"), flat([p.grad for p in twin.parameters()]))
    limit = clip_norm / 2**0.5
    expected = began - mean(
        mesh.get_group("replicate"), of_node * min(1.0, limit / of_node.norm().item())
    )
    model(batch(rank, 0)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(whole(model.parameters()), expected, rtol=1e-5, atol=1e-6)
    return of_node.norm().item() > limit


@pytest.mark.parametrize("stack", ["FSDP2", "NodeAverage"])
@pytest.mark.parametrize("clip_norm", [1e-3, 1e-1, 1e3])
def test_clip_norm_is_of_the_whole_gradient(pool, stack, clip_norm):
    assert set(pool.run(4, clipped, stack, clip_norm)) == {clip_norm < 1}
