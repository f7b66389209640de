"""Training with p workers in one process, the exchange left out: for convergence.py.

The workers share one model, of which they would hold identical copies. Each has its own data and
generator; logical_methods.py has what a method keeps for each of them.
"""

import math
import time
from argparse import Namespace

import torch
from torch import nn

from benchmarks.training import logical_methods
from examples.demo import digits, text
from examples.demo.methods import share_of_lr
from examples.demo.task import Task
from examples.demo.training import loss_of

TASKS = {"text": text, "digits": digits}
_tasks: list[Task] = []  # of this process, see prepare


def load(options: Namespace) -> list[Task]:
    """A task for each worker."""
    load_one = TASKS[options.task].load
    return [load_one(rank, options.workers, options.non_iid) for rank in range(options.workers)]


def prepare(options: Namespace) -> None:
    """Makes this process ready for train()."""
    torch.set_num_threads(1)
    _tasks[:] = load(options)


def train(method: str, momentum: float, lr: float, seed: int, options: Namespace) -> dict:
    """One run with options.workers workers; a loss of None says that it diverged."""
    tasks, started = _tasks, time.perf_counter()
    torch.manual_seed(seed)  # the same start for every method
    size = {} if options.width is None else {"width": options.width}
    model = tasks[0].make_model(**size)
    params = list(model.parameters())
    way = logical_methods.make(method, params, momentum, options)
    generators = [torch.Generator().manual_seed(seed * len(tasks) + r) for r in range(len(tasks))]
    for step in range(options.steps):
        for rank, task in enumerate(tasks):
            inputs, targets = task.batch(options.global_batch // len(tasks), generators[rank])
            model.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            if options.clip:
                nn.utils.clip_grad_norm_(params, options.clip)
            way.take(rank)
        if not math.isfinite(loss.item()):
            break
        way.finish(lr * share_of_lr(step, options.steps, options.warmup))
    held_out, accuracy = evaluate(model, tasks)
    numel = sum(param.numel() for param in params)
    return {
        "method": method, "momentum": momentum, "lr": lr, "seed": seed, "parameters": numel,
        "k": way.k, "density": way.k / numel, "bytes": way.nbytes,
        "bytes_ratio": way.bytes_ratio(numel), "accuracy": accuracy,
        "loss": held_out if math.isfinite(held_out) else None,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, tasks: list[Task]) -> tuple[float, float]:
    """(loss in nats, accuracy from 0 to 1) on everything held out."""
    inputs, targets = (torch.cat(parts) for parts in zip(*(task.test for task in tasks)))
    logits = model(inputs)
    right = (logits.argmax(-1) == targets).float().mean()
    return loss_of(logits, targets).item(), right.item()
