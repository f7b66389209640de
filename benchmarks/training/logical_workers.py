"""Training with p workers in one process, the exchange left out: for convergence.py.

The workers share one model, of which they would hold identical copies. Each has its own data and
generator, and with a sparse method its own memory and payload, which gmc_cuda.ops makes, merges and
applies. A method takes each worker's gradient in turn and then finishes the step.
"""

import math
import time
from argparse import Namespace

import torch
from torch import Tensor, nn

from examples.demo import digits, text
from examples.demo.methods import share_of_lr
from examples.demo.task import Task
from examples.demo.training import loss_of
from gmc_cuda import ops, reference
from gmc_cuda._engine import budget

DTYPES = {str(dtype).removeprefix("torch.").split("_")[0]: dtype for dtype in reference.WIRE_DTYPES}
RULES = {
    "dense": "torch.optim.SGD on the mean gradient",
    "gmc": "global momentum",
    "dgc": "local momentum with momentum factor masking",
    "memsgd": "memory SGD with local momentum, which is DGC without masking",
    "plain": "memory SGD without momentum",
}
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


class Dense:
    def __init__(self, params: list[nn.Parameter], momentum: float, workers: int) -> None:
        self.params, self.workers = params, workers
        self.optimizer = torch.optim.SGD(params, lr=0.0, momentum=momentum)
        self.sums = [torch.zeros_like(param) for param in params]
        self.k = sum(param.numel() for param in params)
        self.nbytes = 4 * self.k

    def take(self, rank: int) -> None:
        for total, param in zip(self.sums, self.params):
            total += param.grad

    def finish(self, lr: float) -> None:
        for param, total in zip(self.params, self.sums):
            param.grad = total / self.workers
            total.zero_()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


class Sparse:
    """All parameters are one bucket."""

    def __init__(
        self, params: list[nn.Parameter], momentum: float, method: str, options: Namespace
    ) -> None:
        rule, dtype = method.split(":")
        self.params, self.momentum, self.dtype = params, momentum, DTYPES[dtype]
        self.numel = sum(param.numel() for param in params)
        sent = {"density": options.density}
        if options.density is None:
            sent = {"bytes_ratio": options.bytes_ratio}
        self.k = budget.entries(sent, self.numel, self.dtype)
        self.nbytes = ops.payload_nbytes(self.numel, self.k, self.dtype)
        self.memories = torch.zeros(options.workers, self.numel)
        self.buffers = [None] * options.workers  # the momentum of each worker, if it is local
        if rule in ("dgc", "memsgd"):
            self.buffers = list(torch.zeros(options.workers, self.numel))
        self.masking = rule == "dgc"
        self.states = [ops.select_state(self.numel, self.k, "cpu") for _ in self.buffers]
        self.payloads: list[Tensor] = []
        self.aggregate: Tensor | None = None

    def take(self, rank: int) -> None:
        buffer = self.buffers[rank]
        payload = ops.compress_(
            self.memories[rank],
            [param.grad for param in self.params],
            self.k,
            momentum=self.momentum,
            aggregate=self.aggregate if buffer is None else None,
            momentum_buffer=buffer,
            wire_dtype=self.dtype,
            state=self.states[rank],
        )
        if self.masking:
            ops.mask_(buffer, payload, self.k, self.dtype)
        self.payloads.append(payload)

    def finish(self, lr: float) -> None:
        self.aggregate = ops.merge(torch.stack(self.payloads), self.numel, self.k, self.dtype)
        self.payloads.clear()
        ops.apply_([param.data for param in self.params], self.aggregate, lr)


def train(method: str, momentum: float, lr: float, seed: int, options: Namespace) -> dict:
    """One run with options.workers workers; a loss of None says that it diverged."""
    tasks, started = _tasks, time.perf_counter()
    torch.manual_seed(seed)  # the same start for every method
    model = tasks[0].make_model()
    params = list(model.parameters())
    dense = method == "dense"
    way = (
        Dense(params, momentum, len(tasks)) if dense else Sparse(params, momentum, method, options)
    )
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
    loss, accuracy = evaluate(model, tasks)
    numel = sum(param.numel() for param in params)
    return {
        "method": method, "momentum": momentum, "lr": lr, "seed": seed, "parameters": numel,
        "k": way.k, "density": way.k / numel, "bytes": way.nbytes,
        "bytes_ratio": 4 * numel / way.nbytes, "loss": loss if math.isfinite(loss) else None,
        "accuracy": accuracy, "seconds": time.perf_counter() - started,
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, tasks: list[Task]) -> tuple[float, float]:
    """(loss in nats, accuracy from 0 to 1) on everything held out."""
    inputs, targets = (torch.cat(parts) for parts in zip(*(task.test for task in tasks)))
    logits = model(inputs)
    right = (logits.argmax(-1) == targets).float().mean()
    return loss_of(logits, targets).item(), right.item()
