"""One worker of benchmarks/network.py, inside its namespace.

    network_worker.py SECONDS METHOD...       with torchrun's variables in the environment

Before and after each method the control is measured: every worker computes, none sends. Rank 0
prints a line of JSON for each method.
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean, median, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bench.network_methods import METHODS, ComputeAlone
from compare_methods import text

WIDTH, LAYERS, BATCH = 384, 6, 1
WARM_UP, CONTROL_STEPS, MOST_STEPS = 3, 8, 40
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def main() -> None:
    torch.set_num_threads(1)
    seconds, methods = float(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    task = text.load(rank, world, False)
    generator = torch.Generator().manual_seed(rank)
    batches = [task.batch(BATCH, generator) for _ in range(64)]
    before = measure(ComputeAlone(make_model()), batches, 0)
    for name in methods:
        method = METHODS[name](make_model())
        found = measure(method, batches, seconds)
        found["payload_bytes"] = method.payload_bytes
        del method
        after = measure(ComputeAlone(make_model()), batches, 0)
        found["compute_alone"] = mean([before["step"]["median"], after["step"]["median"]])
        before = after
        if rank == 0:
            print(json.dumps({"method": name, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return text.Transformer(WIDTH, LAYERS)


def measure(method, batches: list, seconds: float) -> dict:
    """Steps for about `seconds`, alike on all workers; 0 for the control's number of steps.

    A step's time is from its start to its end on a worker; of each statistic the mean over the
    workers is returned, in seconds.
    """
    model = method.model
    warm = [timed_step(method, model, batch) for batch in batches[:WARM_UP]]
    longest = agree(warm[-1], dist.ReduceOp.MAX)
    steps = CONTROL_STEPS if seconds == 0 else int(min(MOST_STEPS, max(4, seconds / longest)))
    dist.barrier()
    sent = int(SENT.read_text())
    times = [timed_step(method, model, batches[n % len(batches)]) for n in range(steps)]
    sent = int(SENT.read_text()) - sent
    dist.barrier()
    low, _, high = quantiles(times, n=4)
    return {
        "step": {
            "median": average(median(times)),
            "mean": average(mean(times)),
            "quartiles": [average(low), average(high)],
            "steps": steps,
        },
        "link_bytes": round(average(sent / steps)),
    }


def timed_step(method, model: nn.Module, batch: tuple) -> float:
    started = time.perf_counter()
    model.zero_grad()
    inputs, targets = batch
    F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
    method.step()
    return time.perf_counter() - started


def average(value: float) -> float:
    return agree(value, dist.ReduceOp.SUM) / dist.get_world_size()


def agree(value: float, how: dist.ReduceOp) -> float:
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, how)
    return shared.item()


if __name__ == "__main__":
    main()
