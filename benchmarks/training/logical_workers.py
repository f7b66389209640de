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
from gmc_cuda._engine import budget, ranges

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

    def bytes_ratio(self, numel: int) -> float:
        return 1.0

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
        self.k = self.entries(options, self.numel, times=max(options.workers, 2) / 2)
        self.nbytes = ops.payload_nbytes(self.numel, self.k, self.dtype)
        self.workers, self.link_nbytes = options.workers, (options.workers - 1) * self.nbytes
        self.memories = torch.zeros(options.workers, self.numel)
        self.buffers = [None] * options.workers  # the momentum of each worker, if it is local
        if rule in ("dgc", "memsgd"):
            self.buffers = list(torch.zeros(options.workers, self.numel))
        self.masking = rule == "dgc"
        self.states = [ops.select_state(self.numel, self.k, "cpu") for _ in self.buffers]
        self.payloads: list[Tensor] = []
        self.aggregate: Tensor | None = None

    def bytes_ratio(self, numel: int) -> float:
        """How many times fewer bytes a link carries than with a ring all-reduce."""
        if self.workers == 1:
            return 4 * numel / self.nbytes
        return budget.ring_nbytes(4 * numel, self.workers) / self.link_nbytes

    def entries(self, options: Namespace, numel: int, times: float = 1.0) -> int:
        ratio = None if options.density is not None else options.bytes_ratio
        return budget.entries(options.density, ratio, numel, self.dtype, times)

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


class TwoSided(Sparse):
    """Each range of the bucket goes to its owner, who sends its largest entries to all."""

    def __init__(
        self, params: list[nn.Parameter], momentum: float, method: str, options: Namespace
    ) -> None:
        super().__init__(params, momentum, method, options)
        self.ranges = ranges.cut(self.numel, options.workers)
        self.ks = [self.entries(options, part.numel) for part in self.ranges]
        self.k = sum(self.ks)
        nbytes = [
            ops.payload_nbytes(part.numel, k, self.dtype)
            for part, k in zip(self.ranges, self.ks, strict=True)
        ]
        self.nbytes = sum(nbytes) + nbytes[0]
        self.link_nbytes = sum(nbytes[1:]) + (options.workers - 1) * nbytes[0]
        self.owned = [torch.zeros(part.numel) for part in self.ranges]
        self.aggregates: list[Tensor | None] = [None] * options.workers
        self.received: list[list[Tensor]] = [[] for _ in self.ranges]
        self.state_of: dict[tuple[int, int], Tensor] = {}

    def state(self, rank: int, part: int) -> Tensor:
        """Of a worker's selection in a range; rank -1: of the owner's."""
        if (rank, part) not in self.state_of:
            numel, k = self.ranges[part].numel, self.ks[part]
            self.state_of[rank, part] = ops.select_state(numel, k, "cpu")
        return self.state_of[rank, part]

    def take(self, rank: int) -> None:
        grad = torch.cat([param.grad.view(-1) for param in self.params])
        buffer = self.buffers[rank]
        for j, (part, k) in enumerate(zip(self.ranges, self.ks, strict=True)):
            place = slice(part.begin, part.end)
            payload = ops.compress_(
                self.memories[rank][place],
                [grad[place]],
                k,
                momentum=0.0 if buffer is None else self.momentum,
                momentum_buffer=None if buffer is None else buffer[place],
                wire_dtype=self.dtype,
                state=self.state(rank, j),
            )
            if self.masking:
                ops.mask_(buffer[place], payload, k, self.dtype)
            self.received[j].append(payload)

    def finish(self, lr: float) -> None:
        moved = []
        for j, (memory, k) in enumerate(zip(self.owned, self.ks, strict=True)):
            previous = self.aggregates[j]
            if previous is not None and self.buffers[0] is None:
                ops.apply_([memory], previous, -self.momentum)
            mean = ops.merge(torch.stack(self.received[j]), memory.numel(), k, self.dtype)
            answer = ops.compress_(
                memory, [None], k, params=[memory], momentum=1.0, aggregate=mean,
                wire_dtype=self.dtype, state=self.state(-1, j),
            )  # fmt: skip
            self.received[j].clear()
            self.aggregates[j] = ops.merge(answer[None], memory.numel(), k, self.dtype)
            moved.append(ops.densify(self.aggregates[j], memory.numel()))
        ops.apply_([param.data for param in self.params], ops.sparsify(torch.cat(moved)), lr)


WAYS = {"all_gather": Sparse, "reduce_scatter": TwoSided}


def train(method: str, momentum: float, lr: float, seed: int, options: Namespace) -> dict:
    """One run with options.workers workers; a loss of None says that it diverged."""
    tasks, started = _tasks, time.perf_counter()
    torch.manual_seed(seed)  # the same start for every method
    model = tasks[0].make_model()
    params = list(model.parameters())
    way: Dense | Sparse
    if method == "dense":
        way = Dense(params, momentum, len(tasks))
    else:
        way = WAYS[options.exchange](params, momentum, method, options)
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
        "bytes_ratio": way.bytes_ratio(numel), "loss": loss if math.isfinite(loss) else None,
        "accuracy": accuracy, "seconds": time.perf_counter() - started,
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, tasks: list[Task]) -> tuple[float, float]:
    """(loss in nats, accuracy from 0 to 1) on everything held out."""
    inputs, targets = (torch.cat(parts) for parts in zip(*(task.test for task in tasks)))
    logits = model(inputs)
    right = (logits.argmax(-1) == targets).float().mean()
    return loss_of(logits, targets).item(), right.item()
