"""overlap=True: the same steps, sent during the backward pass."""

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import flat, same_on_all_ranks

CAP = 300 * 4 / 2**20  # MiB: several buckets


def network():
    torch.manual_seed(3)
    layers = [torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(20, 4))


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 10, generator=generator)


def compare(group, make, density):
    """Overlapped, with gradient accumulation and a layer that some ranks do not use."""
    rank = dist.get_rank(group)
    models = [network(), network()]
    optimizers = [
        make(m.parameters(), lr=0.1, density=density, process_group=group, bucket_cap_mb=CAP,
             overlap=overlap)
        for m, overlap in zip(models, (False, True), strict=True)
    ]  # fmt: skip
    assert len(optimizers[0].engine.buckets) > 1
    for step in range(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with optimizer.no_sync():
                model(batch(rank, step)).square().mean().backward()
            used = model[2:] if (step + rank) % 3 == 0 else model
            inputs = torch.ones(4, 10 if used is model else 20) * batch(rank, step)[0, 0]
            used(inputs).square().mean().backward()
            if optimizer.overlap and (step + rank) % 3 != 0:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        assert torch.equal(flat(list(models[0].parameters())), flat(list(models[1].parameters())))
    assert same_on_all_ranks(group, list(models[1].parameters()))
    assert optimizers[0].stats() == optimizers[1].stats()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("make", [gmc_cuda.GMC, gmc_cuda.DGC])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_overlap_gives_the_same_bits(pool, size, make, density):
    pool.run(size, compare, make, density)


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        (8, {}, [8 * 65_536]),
        (8, {"overlap": True}, 2 * [4 * 65_536]),  # at least 1 MiB each
        (32, {"overlap": True}, 4 * [8 * 65_536]),
        (8, {"overlap": True, "bucket_cap_mb": 0.25}, 8 * [65_536]),
    ],
)
def test_default_buckets(layers, options, expected):
    """One bucket up to 256 MiB; overlap would have nothing to hide with that."""
    params = [torch.nn.Parameter(torch.zeros(65_536)) for _ in range(layers)]
    optimizer = gmc_cuda.GMC(params, lr=0.1, **options)
    assert [bucket.numel for bucket in optimizer.engine.buckets] == expected


def any_order(group):
    """Gradients arrive in another order on each rank; collectives go out in bucket order."""
    rank = dist.get_rank(group)
    outcomes = []
    for overlap in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(300)) for _ in range(3)]
        optimizer = gmc_cuda.GMC(
            params, lr=0.1, density=0.05, process_group=group, bucket_cap_mb=CAP, overlap=overlap
        )
        assert len(optimizer.engine.buckets) == 3
        for step in range(6):
            order = [0, 1, 2] if (rank + step) % 2 else [2, 0, 1]
            for i in order:
                torch.manual_seed(100 * step + 10 * rank + i)
                (params[i] * torch.randn(300)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(flat(params))
    assert torch.equal(*outcomes)


def test_the_order_in_which_gradients_arrive_does_not_matter(pool):
    pool.run(2, any_order)


def test_second_backward_without_no_sync_is_an_error():
    model = network()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, overlap=True)
    model(batch(0, 0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"wrap every backward pass but the last in .*no_sync"):
        model(batch(0, 1)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("first", [["a", "b"], ["a"]])
def test_a_pass_in_no_sync_after_one_that_was_sent_is_an_error(first):
    """Its gradients would be dropped. Those of a bucket that was not sent yet are added."""
    a, b = (torch.nn.Parameter(torch.zeros(8)) for _ in "ab")
    named = {"a": a, "b": b}
    optimizer = gmc_cuda.GMC([a, b], 1.0, momentum=0.0, density=1.0, overlap=True)
    sum(named[name].sum() for name in first).backward()
    with optimizer.no_sync():
        if len(first) == 2:
            with pytest.raises(RuntimeError, match="arrived again before step()"):
                (3 * a).sum().backward()
            return
        (3 * a + 5 * b).sum().backward()
    optimizer.step()
    assert a.tolist() == [-4.0] * 8
    assert b.tolist() == [-5.0] * 8


def test_clipping_after_an_overlapped_backward_finds_no_gradient():
    model = network()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, overlap=True)
    model(batch(0, 0)).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
    optimizer.step()


def test_what_cannot_be_done_between_backward_and_step():
    model = network()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, overlap=True)
    state = optimizer.state_dict()
    model(batch(0, 0)).sum().backward()
    with pytest.raises(RuntimeError, match="load_state_dict between backward"):
        optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="add_param_group between backward"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


def test_local_clipping_needs_the_whole_gradient():
    with pytest.raises(ValueError, match="clip_norm: got a number with overlap=True"):
        gmc_cuda.DGC(network().parameters(), lr=0.1, clip_norm=1.0, overlap=True)
