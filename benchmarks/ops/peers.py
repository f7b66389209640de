"""What a user would pick instead: each leaves the indices and values to send, and the residual.

All work on one memory of their own, on the same gradients, and on the same aggregate, which they
get dense. Their wire values are bfloat16, like ours.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops import cub_topk
from benchmarks.ops.problem import LR, MOMENTUM, Problem
from benchmarks.ops.timing import Participant, Stage

Selected = tuple[Tensor, Tensor]


def eager(memory: Tensor, local: Tensor | None, grad: Tensor, dense: Tensor, k: int) -> Selected:
    """Plain PyTorch, selection by torch.topk."""
    _accumulate(memory, local, grad, dense)
    return _take(memory, memory.abs().topk(k, sorted=False).indices)


def sampled(memory: Tensor, local: Tensor | None, grad: Tensor, dense: Tensor, k: int) -> Selected:
    """DGC's threshold from a sample of 1 %, and its loop for when that was far off.

    Selects between 0.8 k and k entries: not exactly k, and not exactly the largest. Waits for the
    device in every round of the loop.
    """
    _accumulate(memory, local, grad, dense)
    importance = memory.abs()
    stride = min(100, memory.numel())
    sample = importance[int(torch.randint(stride, ())) :: stride].contiguous()
    count = min(sample.numel(), max(1, math.ceil(k * sample.numel() / memory.numel())))
    threshold = sample.topk(count, sorted=False).values.min()
    for _ in range(10):
        indices = (importance >= threshold).nonzero().view(-1)
        if indices.numel() > 1.3 * k:
            indices = indices[importance[indices].topk(k, sorted=False).indices]
            break
        if indices.numel() >= 0.8 * k:
            break
        threshold = threshold * 0.8
    return _take(memory, indices[:k])


def _accumulate(memory: Tensor, local: Tensor | None, grad: Tensor, dense: Tensor) -> None:
    if local is None:
        memory.add_(grad).add_(dense, alpha=MOMENTUM)
    else:
        memory.add_(local.mul_(MOMENTUM).add_(grad))


def _take(memory: Tensor, indices: Tensor) -> Selected:
    values = memory[indices]
    wire = values.bfloat16()
    memory[indices] = values - wire.float()
    return indices, wire


def for_compress(problem: Problem, cap: float, left_out: dict[str, str]) -> list[Participant]:
    """The peers of compress. What cannot run on this machine is added to `left_out`."""
    case, device = problem.case, problem.device
    memory = torch.zeros(case.numel, device=device)
    local = None if problem.local is None else torch.zeros_like(memory)
    dense = torch.zeros_like(memory)

    def refresh(_: int) -> None:
        dense.copy_(problem.dense_aggregate())

    def participant(name: str, call: Callable[[int], object]) -> Participant:
        stages = [Stage("refresh", refresh, timed=False), Stage("compress", call)]
        return Participant(name, stages, cap=cap)

    def torch_peer(name: str, function: Callable[..., Selected]) -> Participant:
        return participant(
            name, lambda _: function(memory, local, problem.gradients.fresh(), dense, case.k)
        )

    # Without the reset, earlier cases' shapes would count as recompilations, and after a few of
    # them torch.compile falls back to eager in silence.
    torch._dynamo.reset()
    peers = [
        torch_peer("eager topk", eager),
        torch_peer("compiled topk", torch.compile(eager, dynamic=False)),
        torch_peer("sampled threshold (DGC)", sampled),
    ]
    reason = cub_topk.missing(device)
    if reason:
        left_out[cub_topk.NAME] = reason
    elif local is not None:
        left_out[f"{cub_topk.NAME}, method dgc"] = "made for global momentum only"
    else:
        select = cub_topk.Selection(case.numel, case.k, device)
        peers.append(
            participant(
                cub_topk.NAME,
                lambda _: select(memory, problem.gradients.fresh(), dense, MOMENTUM),
            )
        )
    return peers


def for_merge(problem: Problem, cap: float) -> Participant:
    """Payloads that are unpacked already, added into a dense tensor in rank order."""
    from gmc_cuda import ops

    case = problem.case
    unpacked = [
        ops.unpack(payload, case.numel, case.k, case.wire_dtype)[:2]
        for payload in problem.payloads[0]
    ]
    unpacked = [(indices.int(), values) for indices, values in unpacked]
    dense = torch.zeros(case.numel, device=problem.device)

    def merge(_: int) -> None:
        dense.zero_()
        for indices, values in unpacked:
            dense.index_add_(0, indices, values)
        dense.mul_(1 / case.ranks)

    return Participant("eager index_add_", [Stage("merge", merge)], cap=cap)


def fused_sgd(problem: Problem) -> Participant:
    """The dense step: parameters and momentum in the gradient's dtype, as torch wants it."""
    flat = torch.zeros(problem.case.numel, dtype=problem.case.dtype, device=problem.device)
    params = [torch.nn.Parameter(view) for view in problem.split(flat)]
    optimizer = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True)

    def give_gradients(_: int) -> None:
        for param, grad in zip(params, problem.split(problem.gradients.fresh())):
            param.grad = grad

    stages = [
        Stage("gradients", give_gradients, timed=False),
        Stage("step", lambda _: optimizer.step()),
    ]
    return Participant("fused SGD", stages, every_round=True)


def add_gradient(problem: Problem) -> Participant:
    """memory.add_(grad): the least that any method with a memory must do."""
    memory = torch.zeros(problem.case.numel, device=problem.device)
    stage = Stage("add", lambda _: memory.add_(problem.gradients.fresh()))
    return Participant("memory.add_(grad)", [stage], every_round=True)


@functools.cache
def _copy_buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    nbytes = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def copy(device: torch.device) -> tuple[Participant, int]:
    """A copy within the device's memory, and the bytes that it reads and writes."""
    source, target = _copy_buffers(device)
    nbytes = source.numel()
    return Participant("copy", [Stage("copy", lambda _: target.copy_(source))]), 2 * nbytes
