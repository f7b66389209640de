"""One worker of benchmarks/training/time_to_loss.py, inside its namespace: what steps are worth.

    training_worker.py STEPS METHOD...       with torchrun's variables in the environment

Trains the demo's text model with each method, at its best momentum and learning rate, and prints a
line of JSON: the held-out loss after so many steps.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.training.network_methods import METHODS
from benchmarks.training.network_models import MODELS
from examples.demo import text
from examples.demo.methods import LR_WARMUP, share_of_lr
from examples.demo.options import BEST as DEMO
from examples.demo.training import evaluate, loss_of

EVERY, CLIP = 10, 1.0
# Each method's best momentum and learning rate, as convergence.py found them.
DENSE = DEMO["text"]["dmsgd"]
BEST = {
    "DDP": DENSE, "DDP bf16": DENSE, "PowerSGD rank 4": DENSE,
    "GMC": (0.6, 1.024), "eager GMC": (0.6, 1.024), "GMC float4": (0.5, 1.81019),
    "DGC": (0.9, 0.724077), "eager DGC": (0.9, 0.724077), "DGC float4": (0.9, 1.024),
    "GMC two-sided float4": DEMO["text"]["gmc"], "DGC two-sided float4": DEMO["text"]["dgc"],
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    steps, names = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    task = text.load(rank, world, False)
    for name in names:
        momentum, lr = BEST[name]
        method = METHODS[name](MODELS["text"].make(), lr, momentum)
        generator = torch.Generator().manual_seed(rank)
        losses = [evaluate(method.model, task, world)[0]]
        for step in range(steps):
            method.set_lr(lr * share_of_lr(step, steps, LR_WARMUP))
            method.model.zero_grad()
            inputs, targets = task.batch(MODELS["text"].batch, generator)
            loss_of(method.model(inputs), targets).backward()
            # A worker's own gradient, or under DDP the mean: there is no other at hand.
            nn.utils.clip_grad_norm_(method.model.parameters(), CLIP)
            method.step()
            if (step + 1) % EVERY == 0:
                losses.append(evaluate(method.model, task, world)[0])
        found = {"method": name, "momentum": momentum, "lr": lr, "losses": losses}
        if rank == 0:
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
