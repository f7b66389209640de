"""`python -m gmc_cuda.advise`: what a training step would take with each method, on this network.

    torchrun --nproc-per-node 1 --nnodes 4 ... -m gmc_cuda.advise my_model:make

Start it on the machines that will train, as training itself. ``make()`` returns the model, on its
device, and a function ``backward(model)`` that runs one forward and backward pass over a batch of
the usual size. Each method then makes a few steps with a copy of the model; only what would take
too long is estimated, from a smaller all-reduce. The loss does not matter here: which
method learns enough at which density is what docs/tuning.md is about.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gmc_cuda
from gmc_cuda._engine.budget import ring_nbytes

Backward = Callable[[nn.Module], Any]

LEAST_STEPS, MOST_STEPS, WARM_UP = 3, 50, 2
_FIRST_NBYTES, _GROWTH = 1 << 12, 8  # of the all-reduces that are timed
_WORTH_WHILE = 0.9  # a step of less than this share of DDP's is worth another method
_SMALL: dict[str, Any] = {"bytes_ratio": 100, "wire_dtype": torch.float4_e2m1fn_x2}

# What GMC is tried with.
CANDIDATES: dict[str, dict[str, Any]] = {
    "GMC, two-sided": {"exchange": "reduce_scatter", **_SMALL},
    "GMC, two-sided, overlap": {"exchange": "reduce_scatter", "overlap": True, **_SMALL},
    "GMC, all-gather": {"exchange": "all_gather", **_SMALL},
    "GMC, all-gather, overlap": {"exchange": "all_gather", "overlap": True, **_SMALL},
}


class Advice(NamedTuple):
    """How long a training step takes with one method.

    Attributes:
        method: its name.
        seconds: of a step: forward, backward, exchange and update; the slowest worker's median.
        link_bytes: that a worker sends to others in a step.
        options: GMC's, for those of CANDIDATES; else empty.
        estimated: whether the step was too slow to be tried.
    """

    method: str
    seconds: float
    link_bytes: int
    options: dict[str, Any]
    estimated: bool = False


def measure(
    model: nn.Module,
    backward: Backward,
    seconds: float = 120.0,
    group: dist.ProcessGroup | None = None,
) -> list[Advice]:
    """Times a step with each method. All workers of the process group call this together.

    Args:
        model: not wrapped, on its device; it is copied for each method and stays as it is.
        backward: runs the forward and backward pass of one step with the model it is given.
        seconds: about how long all of it may take.
        group: the workers; None: the default process group.

    Returns:
        "compute alone", which is a step that sends nothing, then "DDP", then the CANDIDATES.

    Raises:
        TypeError: the model is wrapped in DistributedDataParallel.
        ValueError: the model has no parameters to train, or backward() gave them no gradients.
        RuntimeError: there is no process group, or it has one worker.
    """
    _check(model, seconds, group)
    clock = _Clock(model, backward, seconds / (len(CANDIDATES) + 3), group)
    nbytes = sum(p.numel() * p.element_size() for p in _trained(model))
    unused = clock.check_backward()
    # With a learning rate of zero steps cost what they always do, and no loss can diverge.
    sgd = partial(torch.optim.SGD, lr=0.0, momentum=0.9, fused=True)
    alone, _ = clock.time(copy.deepcopy(model), sgd)
    found = [Advice("compute alone", alone, 0, {})]

    wire = clock.all_reduce(nbytes)
    link = round(ring_nbytes(nbytes, dist.get_world_size(group)))
    if (alone + wire) * (LEAST_STEPS + WARM_UP) < 2 * clock.share:
        wrapped = DistributedDataParallel(
            copy.deepcopy(model), process_group=group, find_unused_parameters=unused
        )
        found.append(Advice("DDP", clock.time(wrapped, sgd)[0], link, {}))
    else:  # about two thirds of the computing is the backward pass, which hides the exchange
        step = alone / 3 + max(alone * 2 / 3, wire)
        found.append(Advice("DDP", step, link, {}, estimated=True))
    for name, options in CANDIDATES.items():
        gmc = partial(gmc_cuda.GMC, lr=0.0, momentum=0.5, process_group=group, **options)
        with warnings.catch_warnings():  # the same data on every worker is no mistake here
            warnings.filterwarnings("ignore", "all .* workers sent the same payload")
            step, optimizer = clock.time(copy.deepcopy(model), gmc)
        found.append(Advice(name, step, optimizer.stats()["link_bytes_sent"], options))
    return found


def describe(found: list[Advice]) -> list[str]:
    """Lines of text: a table of what :func:`measure` found, and what to do."""
    alone, ddp = found[0].seconds, found[1]
    lines = [
        f"{'':<28}{'a step':>12}{'of compute alone':>20}{'sent in a step':>20}",
    ]
    for row in found:
        lines.append(
            f"{row.method:<28}{1e3 * row.seconds:>9,.1f} ms{row.seconds / alone:>18.2f} x"
            f"{row.link_bytes / 1e6:>17,.3f} MB{'  estimated' * row.estimated}"
        )
    best = min(found[2:], key=lambda row: row.seconds)
    lost = 1 - alone / ddp.seconds
    lines.append(f"With DDP {100 * lost:.0f} % of a step is communication: no method saves more.")
    if best.seconds > _WORTH_WHILE * ddp.seconds:
        lines.append("Stay with DDP: no candidate makes a step shorter by a tenth.")
        return lines
    options = ", ".join(f"{name}={value!r}" for name, value in best.options.items())
    lines.append(f"{ddp.seconds / best.seconds:.1f} times as fast as DDP:")
    lines.append(f"    gmc_cuda.GMC(model.parameters(), lr, {options})")
    return lines


def _check(model: nn.Module, seconds: float, group: dist.ProcessGroup | None) -> None:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        raise RuntimeError(
            "there is nothing to exchange: start several workers with torchrun, and call "
            "init_process_group() in each"
        )
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model: got a DistributedDataParallel, must be the module that it wraps")
    if not any(p.numel() for p in _trained(model)):
        raise ValueError("model: got one without parameters to train, must have some")
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, must be positive")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class _Clock:
    """Times steps, and all-reduces, on all workers of a group together.

    Args:
        share: about how many seconds one method may take.
    """

    def __init__(
        self, model: nn.Module, backward: Backward, share: float, group: dist.ProcessGroup | None
    ) -> None:
        self.share = share
        self._model, self._backward, self._group = model, backward, group
        self._device = _trained(model)[0].device

    def check_backward(self) -> bool:
        """Whether a backward pass leaves some parameter of some worker without a gradient."""
        model = copy.deepcopy(self._model)
        model.zero_grad()
        self._backward(model)
        if all(p.grad is None for p in model.parameters()):
            raise ValueError("backward: left no gradients in the model that it was given")
        return bool(self._largest(any(p.grad is None for p in _trained(model))))

    def time(self, model: nn.Module, make: Callable[..., Any]) -> tuple[float, Any]:
        """Makes steps with an optimizer of its own; returns the seconds of one, and it.

        The time is the median's on the slowest worker, and all workers make equally many.
        """
        optimizer = make(_trained(model))

        def step() -> None:
            optimizer.zero_grad()
            self._backward(model)
            optimizer.step()

        first = [self._seconds(step) for _ in range(WARM_UP)][-1]
        steps = min(max(int(self.share / self._largest(first)), LEAST_STEPS), MOST_STEPS)
        return self._largest(median(self._seconds(step) for _ in range(steps))), optimizer

    def all_reduce(self, nbytes: int) -> float:
        """Seconds of an all-reduce, from smaller ones where it takes long."""
        before_size, before = 0, 0.0
        size = min(_FIRST_NBYTES, nbytes)
        while True:
            tensor = torch.zeros(size // 4, dtype=torch.float32, device=self._device)
            took = self._largest(self._seconds(partial(dist.all_reduce, tensor, group=self._group)))
            if size == nbytes:
                return took
            if took > self.share / _GROWTH:
                return took + (took - before) / (size - before_size) * (nbytes - size)
            before_size, before = size, took
            size = min(_GROWTH * size, nbytes)

    def _seconds(self, action: Callable[[], Any]) -> float:
        self._finish()
        dist.barrier(self._group)  # so that it begins on all workers at once
        started = time.perf_counter()
        action()
        self._finish()
        return time.perf_counter() - started

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _largest(self, value: float) -> float:
        shared = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return float(shared)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gmc_cuda.advise", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("make", metavar="MODULE:FUNCTION", help="returns (model, backward)")
    parser.add_argument("--seconds", type=float, default=120.0, help="in all (default 120)")
    options = parser.parse_args()
    module, _, function = options.make.partition(":")
    if not function:
        parser.error(f"MODULE:FUNCTION: got {options.make!r}, must name both, as in my_model:make")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, on the machines and as many workers as will train")
    sys.path.insert(0, os.getcwd())
    made = getattr(importlib.import_module(module), function)
    dist.init_process_group()
    try:
        model, backward = made()
        found = measure(model, backward, options.seconds)
        if dist.get_rank() == 0:
            print("\n".join(describe(found)), flush=True)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
