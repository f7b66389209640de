"""DistributedDataParallel: made local for the optimizer, or with GMC as its communication hook."""

import gc
import pickle
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import gmc_cuda
from gmc_cuda import ddp as ddp_module
from support.problems import flat, mean, memory_of, same_on_all_ranks

LR = 0.125  # a power of two, so that SGD's fused multiply-add rounds as two operations do
STEPS = 7


class Net(torch.nn.Module):
    """A middle layer that a call may leave out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(10, 20)
        self.middle = torch.nn.Linear(20, 20)
        self.last = torch.nn.Linear(20, 4)

    def forward(self, x, middle=True):
        x = self.first(x).tanh()
        x = self.middle(x).tanh() if middle else x
        return self.last(x)


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 10, generator=generator)


def backward(model, rank, step, use=lambda rank, step: True, accumulate=False):
    """One step's gradients; with accumulate the first half in no_sync()."""
    if accumulate:
        with model.no_sync() if isinstance(model, DDP) else nullcontext():
            model(batch(rank, step + 50)).square().mean().backward()
    model(batch(rank, step), use(rank, step)).square().mean().backward()


def sometimes(rank, step):
    return (rank + step) % 3 != 0


def rarely(rank, step):  # in some steps nobody uses the layer
    return step % 3 == 0


VARIANTS = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused, bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "several buckets": {"bucket_cap_mb": 0.0005},
}


def under_local_gradients(group, options, overlap, accumulate):
    rank = dist.get_rank(group)
    plain, wrapped = Net(), Net()
    model = gmc_cuda.local_gradients(DDP(wrapped, process_group=group, **options))
    assert gmc_cuda.local_gradients(model) is model
    optimizers = [
        gmc_cuda.GMC(m.parameters(), lr=0.1, density=0.05, process_group=group, overlap=overlap,
                     bucket_cap_mb=0.001)
        for m in (plain, wrapped)
    ]  # fmt: skip
    use = sometimes if "find_unused_parameters" in options else lambda rank, step: True
    for step in range(STEPS):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            if accumulate:
                with optimizer.no_sync():
                    backward(m, rank, step + 50)
            backward(m, rank, step, use)
            optimizer.step()
        assert torch.equal(flat(list(plain.parameters())), flat(list(wrapped.parameters())))
    assert same_on_all_ranks(group, list(wrapped.parameters()))
    assert optimizers[0].stats() == optimizers[1].stats()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_under_local_gradients_has_the_bits_of_no_ddp(pool, variant, overlap, accumulate):
    pool.run(2, under_local_gradients, VARIANTS[variant], overlap, accumulate)


def gradients_stay_local(group, options, switch_on):
    rank = dist.get_rank(group)
    wrapped = Net()
    model = gmc_cuda.local_gradients(DDP(wrapped, process_group=group, **options))
    for step in range(3):
        model.zero_grad()
        if switch_on:  # as Lightning does under manual optimization
            model.require_backward_grad_sync = True
        backward(model, rank, step)
        got = flat([p.grad for p in wrapped.parameters()])
        plain = Net()
        backward(plain, rank, step)
        assert torch.equal(got, flat([p.grad for p in plain.parameters()]))


@pytest.mark.parametrize("switch_on", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_workers_own(pool, variant, switch_on):
    pool.run(2, gradients_stay_local, VARIANTS[variant], switch_on)


def hook_beside_optimizer(group, options, accumulate, budget):
    """One bucket: the hook with SGD outside is the optimizer, bit for bit."""
    rank = dist.get_rank(group)
    plain, wrapped = Net(), Net()
    optimizer = gmc_cuda.GMC(plain.parameters(), LR, process_group=group, **budget)
    state = gmc_cuda.GMCHookState(
        group, momentum=0.9, named_parameters=wrapped.named_parameters(), **budget
    )
    model = DDP(wrapped, process_group=group, **options)
    model.register_comm_hook(state, gmc_cuda.gmc_hook)
    sgd = torch.optim.SGD(wrapped.parameters(), lr=LR)
    for step in range(STEPS):
        for m, o in ((plain, optimizer), (model, sgd)):
            o.zero_grad()
            backward(m, rank, step, accumulate=accumulate and step > 0)  # DDP: not when static
            o.step()
        assert len(state._buckets.all()) == 1
        assert torch.equal(flat(list(plain.parameters())), flat(list(wrapped.parameters())))
    assert state.stats() == optimizer.stats()
    saved, held = state.state_dict()["parameters"], optimizer.state
    for name, p in plain.named_parameters():
        assert torch.equal(saved[name]["memory"], held[p]["memory"])


@pytest.mark.parametrize(
    "budget,accumulate",
    [
        ({"density": 0.05}, True),
        ({"density": 1.0}, False),
        ({"bytes_ratio": 10, "wire_dtype": torch.float8_e4m3fn}, False),
    ],
)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "several buckets"])
def test_hook_with_one_bucket_has_the_bits_of_the_optimizer(pool, variant, accumulate, budget):
    pool.run(2, hook_beside_optimizer, VARIANTS[variant], accumulate, budget)


def mass(group, options, use, set_to_none, nan_at, exchange):
    """Mass equation with several buckets that DDP rebuilds, and a_t where nobody used a layer."""
    rank = dist.get_rank(group)
    wrapped = Net()
    params = list(wrapped.parameters())
    state = gmc_cuda.GMCHookState(
        group, momentum=0.9, density=0.05, exchange=exchange,
        named_parameters=wrapped.named_parameters(),
    )  # fmt: skip
    model = DDP(wrapped, process_group=group, bucket_cap_mb=0.0009, **options)
    partitions = []

    def watched(state, bucket):
        if bucket.index() == 0:
            partitions.append([])
        partitions[-1].append([id(p) for p in bucket.parameters()])
        return gmc_cuda.gmc_hook(state, bucket)

    model.register_comm_hook(state, watched)
    sgd = torch.optim.SGD(params, lr=LR)
    names = [name for name, _ in wrapped.named_parameters()]

    def held(name):
        saved = state.state_dict()["parameters"]
        return flat([saved.get(n, {}).get(name, torch.zeros_like(p))
                     for n, p in zip(names, params, strict=True)])  # fmt: skip

    def unsent():
        return held("memory") + dist.get_world_size(group) * held("owner_memory")

    zeros = [torch.zeros_like(p) for p in params]
    memory, aggregate = flat(zeros), flat(zeros)
    for step in range(12):
        sgd.zero_grad(set_to_none=set_to_none)
        plain = Net()
        plain.load_state_dict(wrapped.state_dict())
        backward(plain, rank, step, use)
        local = flat([z if p.grad is None else p.grad
                      for p, z in zip(plain.parameters(), zeros, strict=True)])  # fmt: skip
        before = flat(params)
        if step == nan_at and rank == 1:
            handle = params[-1].register_hook(lambda g: g.index_fill(0, torch.tensor(0), torch.nan))
            local[-params[-1].numel()] = 0
        backward(model, rank, step, use)
        if step == nan_at and rank == 1:
            handle.remove()
        sgd.step()
        gone = (before - flat(params)) / LR  # a_t as it reached the parameters
        left = mean(group, unsent()) + gone
        came = mean(group, memory) + mean(group, local) + 0.9 * aggregate
        assert (left - came).abs().max() < 2e-6 * (1 + came.abs().max() + before.abs().max() / LR)
        if step == nan_at:
            assert gone.abs().max() == 0
            assert held("memory").isfinite().all()
        memory, aggregate = unsent(), held("momentum_buffer")
    assert same_on_all_ranks(group, params)
    assert state.stats()["skipped_steps"] == (nan_at is not None)
    assert len(partitions[-1]) > 1
    return partitions


@pytest.mark.parametrize(
    "size,use,views,set_to_none,exchange",
    [(2, None, False, True, "all_gather"), (2, None, True, False, "all_gather")]
    + [(2, use, views, none, "all_gather") for use in (sometimes, rarely)
       for views in (False, True) for none in (False, True)]
    + [(2, None, False, True, "reduce_scatter"), (4, None, True, False, "reduce_scatter"),
       (4, sometimes, False, True, "reduce_scatter")],
)  # fmt: skip
def test_hook_keeps_the_mass_equation(pool, size, use, views, set_to_none, exchange):
    options = {"gradient_as_bucket_view": views, "find_unused_parameters": use is not None}
    partitions = pool.run(size, mass, options, use or every, set_to_none, 4, exchange)[0]
    if use is None:
        assert partitions[0] != partitions[-1]  # DDP did rebuild its buckets


def every(rank, step):
    return True


def resumed(group, named):
    rank = dist.get_rank(group)

    def start():
        net = Net()
        model = DDP(net, process_group=group, bucket_cap_mb=0.0009)
        state = gmc_cuda.GMCHookState(group, density=0.05, named_parameters=net.named_parameters())
        model.register_comm_hook(state, gmc_cuda.gmc_hook)
        return net, model, state, torch.optim.SGD(net.parameters(), lr=LR)

    def train(model, sgd, steps):
        for step in steps:
            sgd.zero_grad()
            backward(model, rank, step)
            sgd.step()

    net, model, state, sgd = start()
    train(model, sgd, range(5))
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    saved = deepcopy(state.state_dict())
    train(model, sgd, range(5, 10))

    again, model, state, sgd = start()
    again.load_state_dict(weights)
    state.load_state_dict(saved)
    # DDP groups a new model in its first buckets: the first step differs by what is selected, so
    # compare what must be kept, the state itself, and then a run in which it was loaded later.
    for name, tensors in state.state_dict()["parameters"].items():
        for key, value in tensors.items():
            assert torch.equal(value, saved["parameters"][name][key])
    train(model, sgd, range(5, 10))  # rebuilds
    again.load_state_dict(weights)
    state.load_state_dict(saved)
    train(model, sgd, range(5, 10))
    assert torch.equal(flat(list(net.parameters())), flat(list(again.parameters())))
    with pytest.warns(UserWarning, match="was saved by rank"):
        other = dict(saved, saved_by=dict(saved["saved_by"], rank=1 - rank))
        state.load_state_dict(other)


def test_hook_state_is_saved_and_loaded(pool):
    pool.run(2, resumed, True)


def raising(group):
    rank = dist.get_rank(group)
    net = Net()
    model = DDP(net, process_group=group)
    model.register_comm_hook(gmc_cuda.GMCHookState(group, nonfinite="raise"), gmc_cuda.gmc_hook)
    if rank == 1:
        net.last.bias.register_hook(lambda g: g * torch.inf)
    with pytest.raises(FloatingPointError, match="4 on rank 1; the step was not made"):
        backward(model, rank, 0)


def test_hook_raises_on_every_rank(pool):
    pool.run(2, raising)


def disagreeing(group):
    rank = dist.get_rank(group)
    model = DDP(Net(), process_group=group)
    model.register_comm_hook(gmc_cuda.GMCHookState(group, momentum=rank / 2), gmc_cuda.gmc_hook)
    with pytest.raises(ValueError, match="momentum: 0.0 on rank 0, 0.5 on rank 1"):
        backward(model, rank, 0)


def test_hook_options_that_differ_are_an_error_on_every_rank(pool):
    pool.run(2, disagreeing)


def communicating(group, make, overlap):
    rank = dist.get_rank(group)
    net = Net()
    model = DDP(net, process_group=group)
    optimizer = make(model.parameters(), 0.1, process_group=group, overlap=overlap)
    backward(model, rank, 0)
    before = flat(list(net.parameters()))
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == (
        "the model is inside DistributedDataParallel, which averages the gradients before this "
        "optimizer sees them: everything would be sent twice, and compressed after the averaging. "
        "Leave DDP out, or write, once, right after the model is wrapped:\n"
        "    gmc_cuda.local_gradients(ddp_model)\n"
        "In Trainer, Accelerate, Lightning and Fabric gmc_cuda.integrations does it."
    )
    assert torch.equal(before, flat(list(net.parameters())))


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_ddp_that_communicates_too_is_refused(pool, make):
    pool.run(2, communicating, make, False)


def dense_inside_sparse_across(group):
    """DDP over other workers is what several nodes want: both ranks of a node send the same."""
    rank = dist.get_rank(group)
    nodes = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    net = Net()
    model = DDP(net, process_group=nodes[rank // 2])
    optimizer = gmc_cuda.GMC(net.parameters(), 0.1, density=0.05, process_group=across[rank % 2])
    for step in range(3):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    assert same_on_all_ranks(group, list(net.parameters()))
    assert memory_of(optimizer, list(net.parameters())).abs().max() > 0


def test_ddp_over_other_workers_is_not_refused(pool):
    pool.run(4, dense_inside_sparse_across)


def wrapped_late(group):
    """A DDP that comes after the first step; one that is dropped before is not meant."""
    rank = dist.get_rank(group)
    net = Net()
    optimizer = gmc_cuda.GMC(net.parameters(), 0.1, process_group=group)

    def train(model, steps):
        for step in steps:
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()

    train(net, range(2))
    gc.disable()  # so that the dropped one lives on, as it may on one worker alone
    train(DDP(net, process_group=group), range(2, 4))
    train(net, range(4, 20))
    gc.enable()
    model = DDP(net, process_group=group)
    with pytest.raises(RuntimeError, match=r"gmc_cuda\.local_gradients\(ddp_model\)"):
        train(model, range(20, 40))
    assert optimizer.stats()["steps"] == 32
    gmc_cuda.local_gradients(model)
    train(model, range(32, 34))


def test_ddp_that_comes_after_the_first_step_is_refused(pool):
    pool.run(2, wrapped_late)


def first_in_no_sync(group):
    net = Net()
    model = DDP(net, process_group=group)
    optimizer = gmc_cuda.GMC(net.parameters(), 0.1, process_group=group)
    with model.no_sync():
        backward(model, dist.get_rank(group), 0)
        with pytest.raises(RuntimeError, match=r"gmc_cuda\.local_gradients\(ddp_model\)"):
            optimizer.step()


def test_ddp_that_communicates_too_is_refused_in_no_sync(pool):
    pool.run(2, first_in_no_sync)


def joined(group):
    model = DDP(Net(), process_group=group)
    gmc_cuda.local_gradients(model)
    for join in (model.join, lambda: Join([model])):
        with pytest.raises(RuntimeError) as error, join():
            pass
        assert str(error.value).startswith("join: got a DistributedDataParallel that leaves the")
        assert "sampler = torch.utils.data.DistributedSampler(dataset)" in str(error.value)
        assert "ddp_model.register_comm_hook(gmc_cuda.GMCHookState(), gmc_" in str(error.value)


def test_join_is_refused_under_local_gradients(pool):
    """A worker whose batches have run out would leave the others waiting in step()."""
    pool.run(2, joined)


def hook_in_join(group):
    """Uneven numbers of batches: the replicas stay the same."""
    rank = dist.get_rank(group)
    net = Net()
    model = DDP(net, process_group=group)
    model.register_comm_hook(gmc_cuda.GMCHookState(group, density=0.05), gmc_cuda.gmc_hook)
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    with model.join():
        for step in range(3 + 2 * rank):
            sgd.zero_grad()
            backward(model, rank, step)
            sgd.step()
    assert same_on_all_ranks(group, list(net.parameters()))


def test_hook_lets_a_worker_run_out_of_batches(pool):
    pool.run(2, hook_in_join)


def wrong_uses(group):
    with pytest.raises(TypeError, match="ddp_model: got Net, must be a DistributedDataParallel"):
        gmc_cuda.local_gradients(Net())
    model = DDP(Net(), process_group=group)
    state = gmc_cuda.GMCHookState(group)
    model.register_comm_hook(state, gmc_cuda.gmc_hook)
    assert not ddp_module.is_silenced(model)
    with pytest.raises(RuntimeError, match="can only be called once"):
        gmc_cuda.local_gradients(model)
    with pytest.raises(ValueError, match=r"named_parameters=model.named_parameters\(\)"):
        state.state_dict()
    for options in ({"momentum": 1.0}, {"density": 0.0}, {"nonfinite": "stop"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            gmc_cuda.GMCHookState(group, **options)


def test_wrong_uses(pool):
    pool.run(2, wrong_uses)


# ------------------------------------------------------------------------------- loss scaling


SCALERS = {
    "torch's": torch.amp.GradScaler,
    "ours": gmc_cuda.GradScaler,
    "told": torch.amp.GradScaler,
}


def scaled(group, which, hook):
    """A float16-like overflow above a scale of 2**10, on one rank only; scales that are exact."""
    rank = dist.get_rank(group)
    torch.manual_seed(5)
    model = torch.nn.Linear(30, 20, bias=False)
    ddp = DDP(model, process_group=group)
    scaler = SCALERS[which]("cpu", init_scale=2.0**13, growth_interval=50)
    state = gmc_cuda.GMCHookState(
        group, momentum=0.5, density=0.1, grad_scaler=scaler if which == "told" else None
    )
    if hook:
        ddp.register_comm_hook(state, gmc_cuda.gmc_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    overflows = [float("inf") if rank == 1 else 1.0]
    model.weight.register_hook(lambda g: g * overflows[0] if scaler.get_scale() > 2**10 else g)
    scales = []
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(4, 30, generator=torch.Generator().manual_seed(2 * step + rank))
        scaler.scale(ddp(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert same_on_all_ranks(group, [model.weight])
    (bucket,) = state._buckets.all() if hook else [None]
    memory = bucket.memory.clone() if hook else None
    return scales, model.weight.detach().clone(), memory, state.stats() if hook else None


@pytest.mark.parametrize("which", SCALERS)
def test_hook_with_a_grad_scaler(pool, which):
    """Three steps overflow, and reach the scaler; memory never has the scale in it."""
    for (scales, weight, memory, stats), (expected_scales, *_) in zip(
        pool.run(2, scaled, which, True), pool.run(2, scaled, which, False), strict=True
    ):
        assert scales == expected_scales == [2.0**12, 2.0**11] + [2.0**10] * 6
        assert stats["skipped_steps"] == 3
        assert weight.isfinite().all()
        # Values with the scale in them would be a thousand times as large.
        assert 0 < memory.abs().max() < 10


def several_scalers(group):
    model = torch.nn.Linear(4, 4)
    ddp = DDP(model, process_group=group)
    ddp.register_comm_hook(gmc_cuda.GMCHookState(group), gmc_cuda.gmc_hook)
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    loss, _ = (scaler.scale(ddp(torch.randn(2, 4)).sum()) for scaler in scalers)
    with pytest.raises(ValueError, match=r"grad_scaler: got None where 2 GradScalers scale losses"):
        loss.backward()


def test_several_scalers_must_be_told_apart(pool):
    pool.run(1, several_scalers)


# ---------------------------------------------------------------------- uses of the hook's state


def wrapped_buffers(group, wrapper):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp = DDP(Net(), process_group=group)
    hook = getattr(default_hooks, wrapper)(gmc_cuda.gmc_hook)
    ddp.register_comm_hook(gmc_cuda.GMCHookState(group), hook)
    with pytest.raises(TypeError, match=r"gmc_hook: got gradients in torch\.\w*float16 for param"):
        backward(ddp, dist.get_rank(group), 0)


@pytest.mark.parametrize("wrapper", ["fp16_compress_wrapper", "bf16_compress_wrapper"])
def test_wrappers_that_convert_gradients_are_refused(pool, wrapper):
    pool.run(1, wrapped_buffers, wrapper)


def test_a_state_is_not_copied_without_a_word():
    for copy in (deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state\.state_dict\(\)"):
            copy(gmc_cuda.GMCHookState())


def change_of_options(group, name, value):
    """On one worker alone, in mid-run: an error on both, out of the same backward pass."""
    rank = dist.get_rank(group)
    ddp = DDP(Net(), process_group=group, bucket_cap_mb=0.001)
    state = gmc_cuda.GMCHookState(group, density=0.1)
    ddp.register_comm_hook(state, gmc_cuda.gmc_hook)
    for step in range(3):
        backward(ddp, rank, step)
    if rank == 1:
        setattr(state, name, value)
    with pytest.raises(ValueError, match=rf"step 4: .*\n  {name}: .* on rank 0, .* on rank 1"):
        backward(ddp, rank, 3)


@pytest.mark.parametrize("name,value", [("density", 0.3), ("momentum", 0.2)])
def test_hook_options_that_one_worker_changes(pool, name, value):
    pool.run(2, change_of_options, name, value)


def versions(group):
    ddp = DDP(Net(), process_group=group)
    ddp.register_comm_hook(gmc_cuda.GMCHookState(group, density=0.1), gmc_cuda.gmc_hook)
    before = [p._version for p in ddp.parameters()]
    backward(ddp, dist.get_rank(group), 0)
    assert [p._version for p in ddp.parameters()] == before


def test_hook_does_not_say_that_parameters_were_changed(pool):
    """Only gradients were: autograd would refuse another backward pass through the same graph."""
    pool.run(2, versions)
