"""A model of the time of a training step: for benchmarks/training/scaling.py.

A step is computed, then exchanged; with overlap all but the last bucket's exchange, or half of it
where it is two-sided, lies under the backward pass, two thirds of the computing. Collectives are
rings: a worker of p sends 2 (p - 1) / p times the bytes in an all-reduce, p - 1 times in an
all-gather. Ours cost what must be moved through the GPU's memory (README of csrc), times the factor
that its kernels are predicted to be off that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gmc_cuda._engine import budget

BACKWARD = 2 / 3  # of the computing
BUCKETS = 4


@dataclass(frozen=True)
class Model:
    name: str
    matrices: tuple[tuple[int, int], ...]  # rows, columns of each weight
    vectors: int  # elements of biases and norms
    flop: float  # of a worker's forward and backward pass
    batch: str

    @property
    def numel(self) -> int:
        return self.vectors + sum(rows * columns for rows, columns in self.matrices)

    def low_rank(self, rank: int) -> int:
        """Elements of PowerSGD's two factors, and of what it sends whole."""
        return self.vectors + sum(
            min(rank * (rows + columns), rows * columns) for rows, columns in self.matrices
        )


@dataclass(frozen=True)
class Machine:
    flops: float  # of a worker, reached in training
    memory: float  # bytes a second, of a copy
    latency: float  # seconds for each message of a ring
    launch: float = 1e-5  # seconds of a small kernel
    off_floor: float = 1.3  # our kernels' time over that of the bytes they must move


@dataclass(frozen=True)
class Network:
    workers: int
    rate: float  # bit a second, each way


@dataclass(frozen=True)
class Local:
    """What a method costs a worker beside the link, in seconds."""

    compute: float
    update: float


def all_reduce(nbytes: float, network: Network, latency: float) -> float:
    p = network.workers
    hops = 2 * math.ceil(math.log2(p))  # a tree where that is faster, as NCCL does
    return 2 * (p - 1) / p * 8 * nbytes / network.rate + hops * latency


def all_gather(nbytes: float, network: Network, latency: float) -> float:
    p = network.workers
    return (p - 1) * (8 * nbytes / network.rate + latency)


def step(local: Local, exchange: float, overlapped: float) -> float:
    """Seconds of a step.

    Args:
        exchange: of all buckets, one after the other.
        overlapped: the share of it that may lie under the backward pass.
    """
    hidden = min(overlapped * exchange, BACKWARD * local.compute) * (1 - 1 / BUCKETS)
    return local.compute + exchange - hidden + local.update


@dataclass(frozen=True)
class Sent:
    """What a sparse method sends: one of these, as in gmc_cuda.GMC."""

    density: float | None = None
    bytes_ratio: float | None = None


@dataclass(frozen=True)
class Method:
    """exchange(model, network, latency) and update(model, machine, workers), in seconds."""

    exchange: Callable[[Model, Network, float], float]
    update: Callable[[Model, Machine, int], float]
    overlapped: float
    dense: bool = False  # DistributedDataParallel, with a hook or without, losing nothing

    def time(self, model: Model, machine: Machine, network: Network) -> float:
        compute = model.flop / machine.flops
        local = Local(compute, self.update(model, machine, network.workers))
        return step(local, self.exchange(model, network, machine.latency), self.overlapped)


def dense(itemsize: int) -> Method:
    """float32, or cast to 2 bytes and back by a hook; then fused SGD with momentum."""

    def update(model: Model, machine: Machine, workers: int) -> float:
        cast = 0 if itemsize == 4 else 2 * (4 + itemsize)
        return (20 + cast) * model.numel / machine.memory

    def exchange(model: Model, network: Network, latency: float) -> float:
        return all_reduce(itemsize * model.numel, network, latency)

    return Method(exchange, update, overlapped=True, dense=True)


def power_sgd(rank: int) -> Method:
    """Two products with the gradient, the approximation, the error: 32 B an element, and SGD.

    A handful of small kernels for each matrix: the factors, their orthogonalization, the error.
    """

    def update(model: Model, machine: Machine, workers: int) -> float:
        small = 10 * len(model.matrices) * machine.launch
        return (32 + 20) * model.numel / machine.memory + small

    def exchange(model: Model, network: Network, latency: float) -> float:
        half = 4 * model.low_rank(rank) / 2  # the second factor waits for the first
        return 2 * all_reduce(half, network, latency)

    return Method(exchange, update, overlapped=True)


def gmc(sent: Sent, dtype: torch.dtype, overlapped: bool) -> Method:
    def payload(model: Model, workers: int) -> tuple[int, int]:
        k = budget.entries(sent.density, sent.bytes_ratio, model.numel, dtype, workers / 2)
        return k, budget.payload_nbytes(model.numel, k, dtype)

    def is_dense(model: Model, workers: int) -> bool:
        k, nbytes = payload(model, workers)
        return budget.dense_is_cheaper(model.numel, k, (workers - 1) * nbytes, workers)

    def update(model: Model, machine: Machine, workers: int) -> float:
        k, nbytes = payload(model, workers)
        if is_dense(model, workers):
            return 28 * model.numel / machine.memory  # accumulate, apply
        d = k / model.numel
        entries = model.numel * (1 - (1 - d) ** workers)  # of the aggregate, supports independent
        sectors = model.numel / 8 * (1 - (1 - d) ** (8 * workers))
        moved = 12 * model.numel + workers * nbytes + 3 * 6 * entries + 2 * 32 * sectors
        return machine.off_floor * moved / machine.memory

    def exchange(model: Model, network: Network, latency: float) -> float:
        _, nbytes = payload(model, network.workers)
        if is_dense(model, network.workers):
            return all_reduce(4 * model.numel, network, latency)
        parts = BUCKETS if overlapped else 1
        return parts * all_gather(nbytes / parts, network, latency)

    return Method(exchange, update, overlapped)


TOWARDS_OWNERS = 0.5  # share of a two-sided exchange, which overlap hides


def two_sided(sent: Sent, dtype: torch.dtype, overlapped: bool) -> Method:
    """exchange="reduce_scatter": an all-to-all towards the owners of ranges, an all-gather back.

    Overlap hides the first of the two.
    """

    def payload(model: Model, workers: int) -> tuple[int, int]:
        """Entries and bytes of one range."""
        numel = -(-model.numel // workers)
        k = budget.entries(sent.density, sent.bytes_ratio, numel, dtype)
        return k, budget.payload_nbytes(numel, k, dtype)

    def update(model: Model, machine: Machine, workers: int) -> float:
        k, nbytes = payload(model, workers)
        entries = workers * k  # of the aggregate
        sectors = model.numel / 8 * (1 - (1 - entries / model.numel) ** 8)
        ours = 12 * model.numel / workers  # the second selection
        moved = 12 * model.numel + ours + 3 * workers * nbytes + 3 * 6 * entries + 2 * 32 * sectors
        return machine.off_floor * moved / machine.memory

    def exchange(model: Model, network: Network, latency: float) -> float:
        _, nbytes = payload(model, network.workers)
        parts = BUCKETS if overlapped else 1
        return 2 * parts * all_gather(nbytes / parts, network, latency)  # an all-to-all costs alike

    return Method(exchange, update, TOWARDS_OWNERS * overlapped)


FLOAT4 = Sent(bytes_ratio=100.0)
METHODS = {
    "DDP": dense(4),
    "DDP bf16": dense(2),
    "PowerSGD rank 4": power_sgd(4),
    "GMC": gmc(Sent(0.01), torch.bfloat16, False),
    "GMC overlap": gmc(Sent(0.01), torch.bfloat16, True),
    "GMC float4": gmc(FLOAT4, torch.float4_e2m1fn_x2, False),
    "GMC float4 overlap": gmc(FLOAT4, torch.float4_e2m1fn_x2, True),
    "GMC 0.1 %": gmc(Sent(0.001), torch.bfloat16, False),
    "GMC two-sided float4": two_sided(FLOAT4, torch.float4_e2m1fn_x2, False),
    "GMC two-sided float4 overlap": two_sided(FLOAT4, torch.float4_e2m1fn_x2, True),
    "GMC two-sided 1/1000": two_sided(Sent(bytes_ratio=1000.0), torch.float4_e2m1fn_x2, False),
}


def transformer(
    name: str, layers: int, width: int, vocabulary: int, places: int, tokens: int, gated: int = 0
) -> Model:
    """gated: the width of a gated MLP; 0 for the usual four times, with biases and norms."""
    attention = [(width, 3 * width), (width, width)]
    mlp = [(width, gated)] * 3 if gated else [(width, 4 * width)] * 2
    matrices = tuple([*attention, *mlp] * layers + [(vocabulary, width), (places, width)])
    vectors = layers * (2 * width if gated else 13 * width) + 2 * width
    numel = vectors + sum(rows * columns for rows, columns in matrices)
    return Model(name, matrices, vectors, 6.0 * numel * tokens, f"{tokens} tokens")


def resnet50(images: int) -> Model:
    matrices, vectors = [(64, 3 * 49)], 128
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            matrices += [(width, inputs), (width, 9 * width), (4 * width, width)]
            vectors += 12 * width
            if block == 0:
                matrices.append((4 * width, inputs))
                vectors += 8 * width
            inputs = 4 * width
    matrices.append((1000, 2048))
    # 4.1 billion multiply-adds forward, twice that backward.
    return Model(
        "ResNet-50", tuple(matrices), vectors + 1000, 6 * 4.1e9 * images, f"{images} images"
    )


MODELS = [
    resnet50(64),
    transformer("GPT-2 (124 M)", 12, 768, 50_257, 1024, 8192),
    transformer("BERT large", 24, 1024, 30_522, 512, 4096),
    transformer("decoder (1.2 B)", 22, 2048, 32_000, 0, 4096, gated=5632),
]
