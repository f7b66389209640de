"""Finds a DistributedDataParallel that averages the gradients which an optimizer compresses."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SILENCED = "_gmc_cuda_silenced"  # set on a DDP that leaves the gradients alone


def silence(ddp: torch.nn.Module) -> None:
    setattr(ddp, _SILENCED, True)


def is_silenced(ddp: torch.nn.Module) -> bool:
    """Whether gmc_cuda.local_gradients was called on this DDP."""
    return getattr(ddp, _SILENCED, False)


def refuse_communicating(params: Iterable[Tensor], group: Any) -> None:
    """Raises RuntimeError if a DDP averages these parameters' gradients over this group.

    A DDP over other workers is right: it makes the exchange dense inside a node, sparse across.

    Args:
        group: the optimizer's process group; None for a single worker.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    own = {id(p) for p in params}
    ranks = set(dist.get_process_group_ranks(group))
    for ddp in _communicating():
        if len(ranks & _ranks_of(ddp)) > 1 and any(id(p) in own for p in ddp.parameters()):
            raise RuntimeError(
                "the model is inside DistributedDataParallel, which averages the gradients before "
                "this optimizer sees them: everything would be sent twice, and compressed after "
                "the averaging. Leave DDP out, or write, once, right after the model is wrapped:\n"
                "    gmc_cuda.local_gradients(ddp_model)\n"
                "In Trainer, Accelerate, Lightning and Fabric gmc_cuda.integrations does it."
            )


def _communicating() -> Iterator[torch.nn.Module]:
    from torch.nn.parallel import DistributedDataParallel

    # A parameter has no reference to its DDP. DDP is an abstract class, so issubclass() would run
    # Python code for each of hundreds of thousands of objects.
    for ddp in gc.get_objects():
        if DistributedDataParallel not in type(ddp).__mro__ or is_silenced(ddp):
            continue
        # A DDP whose constructor raised lacks modules or this attribute, and averages nothing.
        if "_modules" in vars(ddp) and vars(ddp).get("require_backward_grad_sync", False):
            yield ddp


def _ranks_of(ddp: Any) -> set[int]:
    """The ranks over which a DDP averages; none if its process group was destroyed."""
    try:
        return set(dist.get_process_group_ranks(ddp.process_group))
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return set()
