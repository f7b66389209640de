import pytest
import torch
import torch.distributed as dist

import gmc_cuda


def broadcast(group):
    """Of every dtype and layout, and one without elements."""
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    for name, value in {
        "bytes": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "flags": torch.rand(7) > 0.5,
        "half": torch.randn(3, 3).half(),
        "double": torch.randn(2, dtype=torch.float64),
        "complex": torch.randn(2, dtype=torch.complex64),
        "transposed": torch.randn(4, 3).t(),
        "none": torch.empty(0),
        "scalar": torch.tensor(float(rank)),
    }.items():
        model.register_buffer(f"{name}_", value)
    weight = model[1].weight.detach().clone()
    model(torch.randn(8, 3))
    gmc_cuda.broadcast_buffers(model, group)
    assert torch.equal(model[1].weight, weight), "parameters are not buffers"
    return dict(model.named_buffers())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_workers_have_rank_0s_buffers(pool, size):
    first, *others = pool.run(size, broadcast)
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name
    assert first["scalar_"] == 0
    assert first["0.num_batches_tracked"] == 1
