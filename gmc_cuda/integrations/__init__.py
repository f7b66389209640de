"""GMC inside training frameworks: one module for each, which imports it.

Frameworks wrap the model in DistributedDataParallel, save rank 0's optimizer only, and make torch's
GradScaler for float16. Each module here silences that DDP, averages memory before a save, so that
all workers have rank 0's state, and makes the scaler a gmc_cuda.GradScaler.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda.amp import GradScaler
from gmc_cuda.ddp import local_gradients
from gmc_cuda.local_updates import LocalUpdates
from gmc_cuda.node_average import NodeAverage

_OWN = (CompressedSGD, LocalUpdates, NodeAverage)
_OLD_NAMES = ("torch.cuda.amp.grad_scaler", "torch.cpu.amp.grad_scaler")


def unwrap(optimizer: Any) -> CompressedSGD | LocalUpdates | NodeAverage | None:
    """The optimizer inside a framework's wrappers; None if it is not gmc_cuda's.

    Lightning's and Fabric's wrappers also have the class of what they wrap, so isinstance cannot
    tell them apart.
    """
    while optimizer is not None:
        inside = getattr(optimizer, "__dict__", {})
        wrapped = inside.get("_optimizer") or inside.get("optimizer")
        if wrapped is None or type(optimizer).__module__.startswith("gmc_cuda."):
            return optimizer if isinstance(optimizer, _OWN) else None
        optimizer = wrapped
    return None


def require_own(optimizers: Iterable[Any], name: str, line: str) -> None:
    """Raises ValueError for an optimizer with which a framework's integration cannot train.

    Beside an optimizer that is not gmc_cuda's, nothing would communicate. A NodeAverage has a part
    of the state on each worker of a node, of which a framework would save rank 0's only.

    Args:
        name: what the framework calls the optimizer.
        line: what to write in its place.
    """
    for optimizer in optimizers:
        if unwrap(optimizer) is None:
            inner = getattr(optimizer, "optimizer", optimizer)
            raise ValueError(
                f"{name}: got {type(inner).__name__}, must be a GMC, DGC, LocalUpdates or "
                "NodeAverage: DistributedDataParallel leaves the gradients to the optimizer here, "
                f"and with another one the workers would train apart. Write\n    {line}\n"
                "or leave gmc_cuda.integrations out"
            )
        _refuse_parts(optimizer, name, line)


def _refuse_parts(optimizer: Any, name: str, line: str) -> None:
    found = unwrap(optimizer)
    if isinstance(found, NodeAverage) and found.workers_in_node > 1:
        raise ValueError(
            f"{name}: got a NodeAverage over {found.workers_in_node} workers in each node, must be "
            "an optimizer whose state one worker can have: each worker of a node has another part "
            f"of this one's, and a framework saves rank 0's alone. Write\n    {line}\nor leave "
            "gmc_cuda.integrations out, call gmc_cuda.local_gradients(ddp_model), and let each "
            "worker save its own optimizer.state_dict()"
        )


def settle(optimizer: Any) -> None:
    """Makes all workers' states equal, before rank 0's is saved. All workers must call it.

    Args:
        optimizer: the optimizer, or a framework's wrapper around it. One that is not gmc_cuda's is
            left alone.

    Raises:
        ValueError: a NodeAverage whose workers in a node have parts of the state.
        RuntimeError: another worker did not call it within the time-out of the process group.
    """
    _refuse_parts(optimizer, "optimizer", "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)")
    found = unwrap(optimizer)
    if isinstance(found, LocalUpdates):
        found.synchronize()
    if found is not None:
        found.average_memory_()


def silence_ddp(model: torch.nn.Module) -> None:
    """Calls local_gradients() on a model, if it contains a DDP.

    With one worker, or a custom strategy, a framework may have left the DDP out.
    """
    from torch.nn.parallel import DistributedDataParallel

    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        local_gradients(model)


def share_scale(scaler: Any, name: str, line: str) -> None:
    """Makes a framework's GradScaler a gmc_cuda.GradScaler with the same scale.

    The object stays and changes its class, because the framework refers to it in several places.

    Args:
        scaler: None where nothing is scaled.
        name: what the framework calls it.
        line: how a user hands the framework a gmc_cuda.GradScaler.

    Raises:
        TypeError: it has another class, whose methods would be lost.
    """
    if scaler is None or isinstance(scaler, GradScaler):
        return
    # torch.cuda.amp.GradScaler and torch.cpu.amp.GradScaler add only a constructor.
    module, base = type(scaler).__module__, torch.amp.GradScaler
    if type(scaler) is not base and not (isinstance(scaler, base) and module in _OLD_NAMES):
        raise TypeError(
            f"{name}: got {module}.{type(scaler).__name__}, must be a "
            "torch.amp.GradScaler, which is then replaced, or a gmc_cuda.GradScaler, with which "
            f"the workers agree on the scale. Write\n    {line}"
        )
    scaler.__class__ = GradScaler


def refuse_with_overlap(optimizer: Any, options: dict[str, tuple[Any, bool]]) -> None:
    """Raises ValueError if a framework would clip or accumulate gradients that were sent already.

    Args:
        options: the framework's options by name: the value, and whether it means to do so.
    """
    found = unwrap(optimizer)
    if not (isinstance(found, CompressedSGD) and found.overlap):
        return
    for name, (value, wrong) in options.items():
        if wrong:
            raise ValueError(
                f"{name}: got {value} with overlap=True, which sends gradients during each "
                "backward pass, so that they can be neither clipped nor accumulated. Write\n"
                f"    gmc_cuda.{type(found).__name__}(..., overlap=False)\n"
                f"or leave {name} out"
            )
