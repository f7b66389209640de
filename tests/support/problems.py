"""Small training problems whose gradients are known in closed form, for the distributed tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmc_cuda._engine.optimizer import CompressedSGD


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Several shapes, some of a numel that is no multiple of 8; 500-odd elements in all."""
    torch.manual_seed(7)
    shapes = [(13, 7), (5,), (16, 8), (3, 4, 2), (1,), (17, 17)]
    return [torch.nn.Parameter(torch.randn(s).mul(0.1).to(dtype)) for s in shapes]


def set_gradients(params: list[Tensor], rank: int, step: int) -> None:
    """Every rank and step has its own gradient: a quadratic's, plus noise."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        param.grad = (0.1 * param.detach().float() + noise).to(param.dtype)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def memory_of(optimizer: CompressedSGD, params: list[Tensor]) -> Tensor:
    """What this worker has not sent on: u, and p times what it owns for all, whose mean over the
    workers is ubar + r."""
    memory = flat([optimizer.state[p]["memory"] for p in params])
    owned = [optimizer.state[p].get("owner_memory", torch.zeros_like(p)) for p in params]
    return memory + optimizer.engine.exchange.size * flat(owned)


def aggregate_of(optimizer: CompressedSGD, params: list[Tensor]) -> Tensor:
    """a_t, float64, in the order of params."""
    parts: dict[Tensor, Tensor] = {}
    for bucket in optimizer.engine.buckets:
        aggregate = bucket.dense_aggregate()
        if aggregate is None:
            aggregate = torch.zeros(bucket.numel)
        parts |= dict(zip(bucket.params, bucket.views(aggregate), strict=True))
    return flat([parts[p] for p in params])


def mean(group: Any, tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def same_on_all_ranks(group: Any, params: list[Tensor]) -> bool:
    """Whether the parameters have the same bits on every rank."""
    own = torch.cat([p.detach().reshape(-1).view(torch.uint8) for p in params])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return all(torch.equal(own, other) for other in everyone)
