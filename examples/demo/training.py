"""One run: one method, one seed."""

import argparse
import math
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo import methods
from examples.demo.progress import Progress
from examples.demo.task import Task

POINTS = 16  # evaluations per run at most, denser at its start


@dataclass
class Point:
    """The state after `step` steps, measured on the held-out data."""

    step: int
    bytes_sent: int  # by one worker to the others, since the start
    loss: float
    accuracy: float  # 0 to 1


@dataclass
class Run:
    seed: int
    parameters: int
    bytes_per_step: float  # sent by one worker to the others, mean over the steps
    dense_bytes_per_step: float  # that it would send in a ring all-reduce of its gradient
    seconds_per_step: float  # wall time on rank 0, evaluation and the first step left out
    skipped_steps: int
    curve: list[Point] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return self.curve[-1].loss

    @property
    def accuracy(self) -> float:
        """0 to 1; NaN if the run diverged."""
        return self.curve[-1].accuracy if math.isfinite(self.loss) else math.nan

    def to_json(self) -> dict:
        return asdict(self)


def train(
    method: str,
    task: Task,
    options: argparse.Namespace,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Run:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)  # the same start for every worker and every method
    model = task.make_model().to(device)
    generator = torch.Generator().manual_seed(seed * world + rank)
    optimizer = methods.make(method, model, options)
    schedulers = methods.make_schedulers(method, optimizer, options)

    count = min(POINTS, -(-options.steps // 3))
    points = {round(options.steps * (i / count) ** 1.5) for i in range(count + 1)}
    curve = [Point(0, 0, *evaluate(model, task, world))]
    sent, seconds, timed = 0, 0.0, 0
    started, first = _now(device), 0
    for step in range(1, options.steps + 1):
        inputs, targets = (tensor.to(device) for tensor in task.batch(options.batch, generator))
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        for every, scheduler in schedulers:
            if step % every == 0:
                scheduler.step()
        stats = optimizer.stats()
        sent += stats["link_bytes_sent"] if world > 1 else stats["bytes_per_step"]
        if step in points or step == 1:
            if step > 1:
                seconds += _now(device) - started
                timed += step - first
            curve.append(Point(step, sent, *evaluate(model, task, world)))
            started, first = _now(device), step
        progress.step(curve[-1].loss)
    dense = stats["dense_bytes_per_step"]
    return Run(
        seed=seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_step=sent / options.steps,
        dense_bytes_per_step=2 * (world - 1) / world * dense if world > 1 else dense,
        seconds_per_step=seconds / timed if timed else math.nan,
        skipped_steps=stats["skipped_steps"],
        curve=curve,
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, world: int) -> tuple[float, float]:
    """(mean loss, accuracy) on all held-out data; every worker measures its part."""
    inputs, targets = task.test
    logits = model(inputs)
    sums = torch.stack([
        loss_of(logits, targets, reduction="sum").double(),
        (logits.argmax(-1) == targets).sum().double(),
        torch.tensor(targets.numel(), dtype=torch.float64, device=logits.device),
    ])  # fmt: skip
    dist.all_reduce(sums)
    loss, correct, count = sums.tolist()
    return loss / count, correct / count


def loss_of(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
