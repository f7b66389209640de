"""torch.compile of the model beside the optimizers, and torch.export of functions with operators.

The operators inside a compiled function are in test_ops.py. Backends that generate no code are
enough here: what they share with inductor is the capture.
"""

import io

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import gmc_cuda
from gmc_cuda import ops
from support.problems import flat, memory_of, parameters, same_on_all_ranks, set_gradients

STEPS = 4


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Linear(20, 4)
    )


def batch(rank, step):
    return torch.randn(8, 10, generator=torch.Generator().manual_seed(100 * step + rank))


def gmc(model, group, **options):
    return gmc_cuda.GMC(
        model.parameters(), 0.1, density=0.05, process_group=group, bucket_cap_mb=0.001, **options
    )


def hooked(model, group):
    """DDP communicates, by our hook; the compiler splits the graph at its buckets."""
    state = gmc_cuda.GMCHookState(group, density=0.05)
    ddp = DDP(model, process_group=group)
    ddp.register_comm_hook(state, gmc_cuda.gmc_hook)
    return ddp, torch.optim.SGD(model.parameters(), lr=0.1)


WAYS = {
    "plain": lambda model, group: (model, gmc(model, group)),
    "overlap": lambda model, group: (model, gmc(model, group, overlap=True)),
    "local gradients": lambda model, group: (
        gmc_cuda.local_gradients(DDP(model, process_group=group)),
        gmc(model, group),
    ),
    "hook": hooked,
}


def beside(group, way):
    rank = dist.get_rank(group)
    ends = []
    for compiled in (False, True):
        model = network()
        wrapped, optimizer = WAYS[way](model, group)
        if compiled:
            wrapped = torch.compile(wrapped, backend="aot_eager")
        for step in range(STEPS):
            optimizer.zero_grad()
            wrapped(batch(rank, step)).square().mean().backward()
            optimizer.step()
        assert same_on_all_ranks(group, list(model.parameters()))
        ends.append(flat(list(model.parameters())))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ends[0], flat(list(network().parameters())))


@pytest.mark.parametrize("way", WAYS)
def test_compiled_model(pool, way):
    pool.run(2, beside, way)


def wrapped_first(group):
    """local_gradients finds the DDP inside what torch.compile returned."""
    model = torch.compile(DDP(network(), process_group=group), backend="aot_eager")
    assert gmc_cuda.local_gradients(model) is model
    optimizer = gmc(model, group)
    model(batch(dist.get_rank(group), 0)).square().mean().backward()
    optimizer.step()
    assert same_on_all_ranks(group, list(model.parameters()))


def test_local_gradients_of_a_compiled_model(pool):
    pool.run(2, wrapped_first)


class Exchange(torch.nn.Module):
    """What one worker does with what two sent."""

    def forward(self, memory, grad, w):
        payload = ops.compress_(memory, [grad], 10, momentum=0.5)
        aggregate = ops.merge(torch.stack([payload, payload]), 100, 10)
        ops.apply_([w], aggregate, 0.1)
        return payload, ops.densify(aggregate, 100)


def test_export():
    inputs = lambda: (torch.linspace(-1, 1, 100), torch.linspace(2, -3, 100), torch.ones(100))  # noqa: E731
    program = torch.export.export(Exchange(), inputs())
    kept = {str(node.target) for node in program.graph.nodes if "gmc_cuda" in str(node.target)}
    assert kept == {f"gmc_cuda.{n}.default" for n in ("compress_", "merge", "apply_", "densify")}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    eager, loaded = inputs(), inputs()
    expected = Exchange()(*eager)
    got = torch.export.load(file).module()(*loaded)
    for one, other in zip((*eager, *expected), (*loaded, *got), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(eager[0], inputs()[0])
    assert not torch.equal(eager[2], inputs()[2])


def compiled_step(group, make):
    """torch.compile around the step of several workers: the same bits."""
    rank = dist.get_rank(group)
    runs = []
    for compiles in (False, True):
        params = parameters()
        optimizer = make(params, lr=0.1, density=0.1, process_group=group)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for number in range(4):
            set_gradients(params, rank, number)
            step()
        runs.append((flat(params), memory_of(optimizer, params)))
    for plain, compiled in zip(*runs, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
def test_a_compiled_step_of_several_workers_has_the_same_bits(pool, make):
    pool.run(2, compiled_step, make)


def compiled_step_of_workers_that_differ(group):
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=0.1, process_group=group)
    with torch.no_grad():
        params[0].add_(dist.get_rank(group))
    set_gradients(params, dist.get_rank(group), 0)
    with pytest.raises(ValueError, match="bits of parameter 0 of group 0"):
        torch.compile(optimizer.step, backend="aot_eager")()


def test_a_compiled_step_tells_in_what_workers_differ(pool):
    pool.run(2, compiled_step_of_workers_that_differ)
