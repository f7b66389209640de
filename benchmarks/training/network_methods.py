"""What benchmarks/training/network.py and time_to_loss.py compare.

All workers make the same model, so none sends its parameters to begin with.

A method is made from a model, a learning rate and a momentum. It has `model`, what the forward pass
goes through, `step()` and `set_lr(lr)`, `every`, the steps from one exchange to the next, and
`payload_bytes`: what a worker hands to a collective in a step, on average, None where that is for
the collective to say.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import gmc_cuda

DENSITY = 0.01


class Optimized:
    every = 1
    model: nn.Module
    optimizer: Any  # torch's, or one of gmc_cuda
    payload_bytes: Any

    def step(self) -> None:
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr


class ComputeAlone(Optimized):
    """The control: each worker trains for itself, with fused SGD, and sends nothing."""

    payload_bytes = 0

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, fused=True)


class Sparse(Optimized):
    def __init__(self, make: Callable, model: nn.Module, lr: float, momentum: float) -> None:
        self.model = model
        self.optimizer = make(model.parameters(), lr=lr, momentum=momentum)

    @property
    def payload_bytes(self) -> int:
        return self.optimizer.stats()["bytes_per_step"]


class Local(Optimized):
    """Fused SGD on each worker alone; an outer GMC over what it moved, every 20 steps."""

    every = 20

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        self.model = model
        inner = torch.optim.SGD(model.parameters(), lr, momentum=momentum, fused=True)
        self.optimizer = gmc_cuda.LocalUpdates(inner, every=self.every)

    @property
    def payload_bytes(self) -> float:
        return self.optimizer.outer.stats()["bytes_per_step"] / self.every


class Dense(Optimized):
    """DistributedDataParallel, with or without a communication hook, and fused SGD."""

    payload_bytes = None

    def __init__(
        self, hook: Callable | None, model: nn.Module, lr: float, momentum: float, **options: Any
    ) -> None:
        self.model = DistributedDataParallel(model, init_sync=False, **options)
        if hook is not None:
            hook(self.model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, fused=True)


def bf16(model: DistributedDataParallel) -> None:
    # DDP refuses torch's hook on gloo by its name; the wrapped one works. DDP looks at the types.
    def compress(
        state: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        return default_hooks.bf16_compress_hook(state, bucket)

    model.register_comm_hook(None, compress)


def power_sgd(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


class Eager:
    """GMC or DGC as it is often written: torch.topk over one flat memory, two all-gathers."""

    every = 1

    def __init__(self, masking: bool, model: nn.Module, lr: float, momentum: float) -> None:
        self.model, self.masking, self.lr, self.beta = model, masking, lr, momentum
        self.params = list(model.parameters())
        numel = sum(param.numel() for param in self.params)
        self.k = round(DENSITY * numel)
        self.memory, self.momentum = torch.zeros(numel), torch.zeros(numel)
        self.payload_bytes = 8 * self.k

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad for param in self.params if param.grad is not None]
        gradient = torch.cat([grad.view(-1) for grad in grads])
        if self.masking:
            self.momentum.mul_(self.beta).add_(gradient)
            self.memory.add_(self.momentum)
        else:
            self.memory.add_(gradient).add_(self.momentum, alpha=self.beta)
        indices = self.memory.abs().topk(self.k, sorted=False).indices
        values = self.memory[indices]
        self.memory[indices] = 0
        if self.masking:
            self.momentum[indices] = 0
        world = dist.get_world_size()
        all_indices = [torch.empty_like(indices, dtype=torch.int32) for _ in range(world)]
        all_values = [torch.empty_like(values) for _ in range(world)]
        dist.all_gather(all_indices, indices.int())
        dist.all_gather(all_values, values)
        mean = torch.zeros_like(self.memory)
        for where, what in zip(all_indices, all_values):
            mean.index_add_(0, where, what, alpha=1 / world)
        if not self.masking:
            self.momentum = mean
        for param, part in zip(self.params, mean.split([p.numel() for p in self.params])):
            param.sub_(part.view_as(param), alpha=self.lr)

    def set_lr(self, lr: float) -> None:
        self.lr = lr


def ours(rule: Callable = gmc_cuda.GMC, **options: Any) -> Callable:
    return functools.partial(Sparse, functools.partial(rule, broadcast_parameters=False, **options))


# With 4 workers the payloads of an all-gather are then 1/100 of a gradient.
FLOAT8: dict[str, Any] = {"wire_dtype": torch.float8_e4m3fn, "bytes_ratio": 50}
FLOAT4: dict[str, Any] = {"wire_dtype": torch.float4_e2m1fn_x2, "bytes_ratio": 50}
TWO_SIDED: dict[str, Any] = {**FLOAT4, "bytes_ratio": 100, "exchange": "reduce_scatter"}
# The last two send all of a gradient: at the slowest rate a step of theirs takes minutes.
METHODS: dict[str, Callable] = {
    "GMC": ours(density=DENSITY),
    "GMC overlap": ours(density=DENSITY, overlap=True),
    "GMC float8": ours(**FLOAT8),
    "GMC float4": ours(**FLOAT4),
    "GMC float4 overlap": ours(**FLOAT4, overlap=True),
    "GMC 0.1 %": ours(density=0.001),
    "GMC two-sided float4": ours(**TWO_SIDED),
    "GMC two-sided float4 overlap": ours(**TWO_SIDED, overlap=True),
    "DGC": ours(gmc_cuda.DGC, density=DENSITY),
    "DGC float4": ours(gmc_cuda.DGC, **FLOAT4),
    "DGC two-sided float4": ours(gmc_cuda.DGC, **TWO_SIDED),
    "LocalUpdates": Local,
    "PowerSGD rank 4": functools.partial(Dense, power_sgd, bucket_cap_mb=1000),
    "eager GMC": functools.partial(Eager, False),
    "eager DGC": functools.partial(Eager, True),
    "DDP bf16": functools.partial(Dense, bf16),
    "DDP": functools.partial(Dense, None),
}
DENSE = ("DDP", "DDP bf16")
