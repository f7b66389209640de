"""One worker of benchmarks/training/network.py, inside its namespace: how long steps take.

    network_worker.py MODEL SECONDS METHOD...       with torchrun's variables in the environment

The methods take turns: a few steps of one, a few of the next, in an order drawn anew for each
round, and the control among them, with which each is compared within the round. So a machine that
slows down for a while slows down all. Rank 0 prints a line of JSON for each method at the end.
"""

import json
import random
import sys
import time
from pathlib import Path
from statistics import mean, median, quantiles
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.training.network_methods import METHODS, ComputeAlone, Eager, Optimized
from benchmarks.training.network_models import MODELS
from examples.demo import text

Timed = Optimized | Eager
LR, MOMENTUM = 0.1, 0.5  # they do not affect the time of a step
WARM_UP, BLOCK, LEAST_ROUNDS = 3, 4, 3  # steps, steps, rounds
SLOW = 1.0  # seconds a step: such a method takes part in the first rounds alone, a step in each
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def main() -> None:
    torch.set_num_threads(1)
    model, seconds, names = MODELS[sys.argv[1]], float(sys.argv[2]), sys.argv[3:]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    task = text.load(rank, world, False)
    generator = torch.Generator().manual_seed(rank)
    batches = [task.batch(model.batch, generator) for _ in range(64)]
    methods = {name: METHODS[name](model.make(), LR, MOMENTUM) for name in names}
    control = ComputeAlone(model.make(), LR, MOMENTUM)
    rows = measure(methods, control, batches, seconds)
    if rank == 0:
        for name, row in rows.items():
            print(json.dumps({"method": name, **row}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    methods: dict[str, Timed], control: ComputeAlone, batches: list, seconds: float
) -> dict:
    """Rounds for about `seconds` for each method, the same number on all workers.

    Times are in seconds, from the start of a step to its end, means over a block and the workers.
    """
    slow = set()
    for name, method in {"": control, **methods}.items():
        times = [timed_step(method, batch) for batch in batches[:WARM_UP]]
        if agree(min(times), dist.ReduceOp.MAX) > SLOW:
            slow.add(name)
        method.model.zero_grad()
    order = random.Random(0)  # the same on all workers
    blocks: dict[str, list[Block]] = {name: [] for name in methods}
    started, rounds = time.perf_counter(), 0
    while True:
        turns = ["", *(name for name in methods if rounds < LEAST_ROUNDS or name not in slow)]
        order.shuffle(turns)
        found = {}
        for name in turns:
            method = methods.get(name, control)
            steps = 1 if name in slow else max(BLOCK, method.every)  # with one exchange, or each
            found[name] = block(method, batches, steps)
        for name in turns:
            if name:
                blocks[name].append(Block(*found[name], found[""][0]))
        rounds += 1
        passed = agree(time.perf_counter() - started, dist.ReduceOp.MAX)
        if rounds >= LEAST_ROUNDS and passed > seconds * len(methods):
            break
    return {name: row(found, methods[name]) for name, found in blocks.items()}


class Block(NamedTuple):
    step: float
    link_bytes: float
    compute_alone: float


def block(method: Timed, batches: list, steps: int) -> tuple[float, float]:
    """(seconds a step, bytes sent in a step)"""
    dist.barrier()
    sent = int(SENT.read_text())
    chosen = random.sample(batches, steps)
    times = [timed_step(method, batch) for batch in chosen]
    dist.barrier()  # its messages queue after those of the last step, which have then left
    sent = int(SENT.read_text()) - sent
    method.model.zero_grad()
    return average(mean(times)), average(sent / steps)


def row(blocks: list[Block], method: Timed) -> dict:
    def statistics(values: list[float]) -> dict:
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return {"median": middle, "quartiles": [low, high]}

    return {
        "step": statistics([found.step for found in blocks]),
        "compute_alone": median(found.compute_alone for found in blocks),
        "times_compute_alone": statistics([f.step / f.compute_alone for f in blocks]),
        "rounds": len(blocks),
        "link_bytes": round(median(found.link_bytes for found in blocks)),
        "payload_bytes": method.payload_bytes,
    }


def timed_step(method: Timed, batch: tuple) -> float:
    started = time.perf_counter()
    method.model.zero_grad()
    backward(method.model, batch)
    method.step()
    return time.perf_counter() - started


def backward(model: nn.Module, batch: tuple) -> None:
    inputs, targets = batch
    F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()


def average(value: float) -> float:
    return agree(value, dist.ReduceOp.SUM) / dist.get_world_size()


def agree(value: float, how: dist.ReduceOp.RedOpType) -> float:
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, how)
    return shared.item()


if __name__ == "__main__":
    main()
