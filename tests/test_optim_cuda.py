"""The optimizers on CUDA tensors: the CPU's bits, no host synchronisation, graphs, NCCL."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gmc_cuda
from support.problems import parameters, same_on_all_ranks, set_gradients

pytestmark = pytest.mark.gpu

METHODS = [
    (gmc_cuda.GMC, {}),
    (gmc_cuda.GMC, {"momentum_form": "iterate", "weight_decay": 0.01}),
    (gmc_cuda.GMC, {"density": 1.0}),
    (gmc_cuda.DGC, {"nesterov": True}),
    (gmc_cuda.DGC, {"clip_norm": 5.0}),
]
TWO_SIDED = {"exchange": "reduce_scatter"}
OVER_NCCL = [
    *METHODS,
    (gmc_cuda.GMC, {"overlap": True}),
    (gmc_cuda.GMC, {"overlap": True, "density": 1.0}),
    (gmc_cuda.GMC, {**TWO_SIDED, "wire_dtype": torch.float4_e2m1fn_x2, "memory_decay": 1.02}),
    (gmc_cuda.GMC, {**TWO_SIDED, "overlap": True, "bucket_cap_mb": 0.001}),
    (gmc_cuda.DGC, {**TWO_SIDED, "nesterov": True}),
]


def on_cuda(params):
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def give_gradients(host, device, step, nan=False):
    set_gradients(host, 0, step)
    if nan:
        host[2].grad[1, 2] = float("nan")
    for p, q in zip(host, device, strict=True):
        q.grad = p.grad.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make,options", METHODS)
def test_same_steps_as_on_the_cpu(make, options, dtype):
    host = parameters(dtype)
    device = on_cuda(host)
    options = {"density": 0.05, **options}
    optimizers = [make(params, lr=0.05, **options) for params in (host, device)]
    for step in range(12):
        give_gradients(host, device, step, nan=step == 5)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05 if step < 8 else 0.01
            optimizer.step()
    for p, q in zip(host, device, strict=True):
        if options.get("clip_norm") or options["density"] == 1.0:  # norms, fused products
            torch.testing.assert_close(p, q.cpu())
        else:
            assert torch.equal(p, q.cpu())
            memory = [o.state[x]["memory"].cpu() for o, x in zip(optimizers, (p, q), strict=True)]
            assert torch.equal(*memory)
    assert [o.stats()["skipped_steps"] for o in optimizers] == [1, 1]


@pytest.mark.parametrize("make,options", METHODS)
def test_steps_do_not_synchronise_the_host(make, options):
    device = on_cuda(parameters())
    optimizer = make(device, lr=0.05, **{"density": 0.05, **options})
    gradients = [torch.randn_like(p) for p in device]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            for p, g in zip(device, gradients, strict=True):
                p.grad = g
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats()["steps"] == 4


@pytest.mark.parametrize("form", ["buffer", "iterate"])
def test_whole_step_in_a_cuda_graph(form):
    """Captured and replayed with a learning rate that changes: the same bits as without."""
    plain, captured = (on_cuda(parameters()) for _ in range(2))
    rates = [torch.tensor(0.05, device="cuda") for _ in range(2)]
    optimizers = [
        gmc_cuda.GMC(params, lr=lr, density=0.05, momentum_form=form)
        for params, lr in zip((plain, captured), rates, strict=True)
    ]
    for p in captured:
        p.grad = torch.zeros_like(p)

    def gradients(step):
        generator = torch.Generator("cuda").manual_seed(step)
        return [torch.randn(p.shape, generator=generator, device="cuda") for p in plain]

    def load(step):
        for p, q, g in zip(plain, captured, gradients(step), strict=True):
            p.grad = g.clone()
            q.grad.copy_(g)
        for rate in rates:
            rate.fill_(0.05 if step < 6 else 0.01)

    for step in range(2):
        load(step)
        for optimizer in optimizers:
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for step in range(2, 10):
        load(step)
        optimizers[0].step()
        graph.replay()
    torch.cuda.synchronize()
    for p, q in zip(plain, captured, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizers[0].state[p]["memory"], optimizers[1].state[q]["memory"])


def test_two_streams_do_not_disturb_each_other():
    streams = [torch.cuda.Stream() for _ in range(2)]
    sets = [on_cuda(parameters()) for _ in range(2)]
    optimizers = [gmc_cuda.GMC(params, lr=0.05, density=0.05) for params in sets]
    torch.cuda.synchronize()
    for step in range(20):
        for params, optimizer, stream in zip(sets, optimizers, streams, strict=True):
            with torch.cuda.stream(stream):
                generator = torch.Generator("cuda").manual_seed(step)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator, device="cuda")
                optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(*sets, strict=True))


def test_overlap_waits_for_layers_on_other_streams():
    """The backward pass of a layer runs on its forward pass's stream, which may be far behind.

    The last gradient, which makes the bucket go, is on a stream that is far ahead.
    """
    results = []
    for overlap in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(256, 256, device="cuda") for _ in range(2)]
        params = [p for layer in layers for p in layer.parameters()]
        optimizer = gmc_cuda.GMC(params, lr=0.01, density=0.05, overlap=overlap)
        stream = torch.cuda.Stream()
        for _ in range(5):
            x = torch.randn(64, 256, device="cuda")
            stream.wait_stream(torch.cuda.current_stream())
            fast = layers[0](x)
            with torch.cuda.stream(stream):  # later, so its backward pass is issued first
                slow = Late.apply(layers[1](x))
            torch.cuda.current_stream().wait_stream(stream)
            (slow.square().sum() + fast.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().cpu() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


class Late(torch.autograd.Function):
    """Does nothing, but its backward pass keeps the stream busy for some milliseconds."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        torch.cuda._sleep(20_000_000)
        return gradient.clone()


def nccl_worker(rank, store, failures):
    os.environ["NCCL_HOSTID"] = str(rank)  # NCCL refuses two ranks on one GPU of one host
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        gloo = dist.new_group(backend="gloo")
        for make, options in OVER_NCCL:
            host = parameters()
            device = on_cuda(host)
            options = {"density": 0.05, **options}
            optimizers = [
                make(params, lr=0.02, process_group=group, **options)
                for params, group in ((host, gloo), (device, None))
            ]
            for step in range(30):
                set_gradients(host, rank, step)
                gradients = [p.grad for p in host]
                if step == 7 and rank == 1:
                    gradients[0][0, 0] = float("inf")
                for params, optimizer in zip((host, device), optimizers, strict=True):
                    optimizer.zero_grad()
                    backward(params, gradients)
                    optimizer.step()
            assert same_on_all_ranks(dist.group.WORLD, device), options
            assert [o.stats()["skipped_steps"] for o in optimizers] == [1, 1], options
            if options["density"] < 1 and "clip_norm" not in options:  # sums in another order
                for p, q in zip(host, device, strict=True):
                    assert torch.equal(p, q.cpu()), options
    except BaseException as error:
        failures.put(f"rank {rank}: {error!r}")
        raise
    finally:
        dist.destroy_process_group()


def backward(params, gradients):
    """A backward pass that leaves these gradients, so that overlap's hooks run."""
    sum((p * g.to(p.device)).sum() for p, g in zip(params, gradients, strict=True)).backward()


def test_two_ranks_over_nccl():
    context = mp.get_context("spawn")
    failures = context.Queue()
    store = tempfile.mktemp(prefix="gmc_cuda_store_")
    workers = [
        context.Process(target=nccl_worker, args=(rank, store, failures)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
        worker.kill()
    assert failures.empty(), failures.get()
    assert all(worker.exitcode == 0 for worker in workers)
