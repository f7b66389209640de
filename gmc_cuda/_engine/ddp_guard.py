"""Finds a DistributedDataParallel that averages the gradients which an optimizer compresses."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SILENCED = "_gmc_cuda_silenced"  # set on a DDP that leaves the gradients alone


def silence(ddp: torch.nn.Module) -> None:
    setattr(ddp, _SILENCED, True)
    # Both ddp.join() and Join([ddp]) call it.
    ddp.join_hook = _refuse_join  # type: ignore[assignment]


def _refuse_join(**kwargs: Any) -> None:
    """Takes the place of a silenced DDP's join_hook(). A DDP can be pickled with it."""
    raise RuntimeError(
        "join: got a DistributedDataParallel that leaves the gradients to the optimizer, must be "
        "one that communicates: nobody would take a worker's place in the optimizer's steps when "
        "its batches have run out. Leave join out and give each worker equally many, for example "
        "by\n"
        "    sampler = torch.utils.data.DistributedSampler(dataset)\n"
        "or let DDP communicate, with\n"
        "    ddp_model.register_comm_hook(gmc_cuda.GMCHookState(), gmc_cuda.gmc_hook)\n"
        "in place of gmc_cuda.local_gradients(ddp_model) and a GMC or DGC"
    )


def is_silenced(ddp: torch.nn.Module) -> bool:
    """Whether gmc_cuda.local_gradients was called on this DDP."""
    return getattr(ddp, _SILENCED, False)


def over(params: Iterable[Tensor]) -> Iterator[torch.nn.Module]:
    """Each DDP that has one of these parameters."""
    from torch.nn.parallel import DistributedDataParallel

    own = {id(p) for p in params}
    # A parameter has no reference to its DDP. DDP is an abstract class, so issubclass() would run
    # Python code for each of hundreds of thousands of objects.
    for ddp in gc.get_objects():
        if DistributedDataParallel not in type(ddp).__mro__:
            continue
        # A DDP whose constructor raised lacks modules or this attribute, and averages nothing.
        made = "_modules" in vars(ddp) and "require_backward_grad_sync" in vars(ddp)
        if made and any(id(p) in own for p in ddp.parameters()):
            yield ddp


def is_due(steps: int) -> bool:
    """Whether to look for a DDP after so many steps, because one may also come later.

    That takes 50 to 350 ms, so it is done first, and then more and more rarely.
    """
    return steps % 16 == 0 and steps & (steps - 1) == 0  # 0, 16, 32, 64, 128, ...


def refuse_communicating(params: Sequence[Tensor], *groups: Any) -> None:
    """Raises RuntimeError if a DDP averages these parameters' gradients over one of these groups.

    A DDP over other workers is right: it makes the exchange dense inside a node, sparse across.

    Args:
        groups: the optimizer's process groups, of which this worker is a member; None for a single
            worker.
    """
    ranks = {rank for group in groups if group is not None
             for rank in dist.get_process_group_ranks(group)}  # fmt: skip
    if len(ranks) <= 1:
        return

    def communicates() -> bool:
        # require_backward_grad_sync does not count: no_sync() makes it False for a while only.
        ddps = (ddp for ddp in over(params) if not is_silenced(ddp))
        return any(len(ranks & _ranks_of(ddp)) > 1 for ddp in ddps)

    if not communicates():
        return
    gc.collect()  # A DDP that was dropped stays until then, on one worker maybe longer.
    if communicates():
        raise RuntimeError(
            "the model is inside DistributedDataParallel, which averages the gradients before "
            "this optimizer sees them: everything would be sent twice, and compressed after "
            "the averaging. Leave DDP out, or write, once, right after the model is wrapped:\n"
            "    gmc_cuda.local_gradients(ddp_model)\n"
            "In Trainer, Accelerate, Lightning and Fabric gmc_cuda.integrations does it."
        )


def _ranks_of(ddp: Any) -> set[int]:
    """The ranks over which a DDP averages; none if its process group was destroyed."""
    try:
        return set(dist.get_process_group_ranks(ddp.process_group))
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return set()
