"""GMC inside training frameworks: one module for each, which imports it.

Frameworks wrap the model in DistributedDataParallel, save the optimizer of rank 0 alone, and make
torch's GradScaler for float16. Each module here makes that DDP local, averages memory before a
save, so that rank 0's state is everybody's, and makes the scaler one that all workers agree with.
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
    """The optimizer inside a framework's wrappers; None if it is not of gmc_cuda.

    Lightning's and Fabric's wrappers take the class of what they wrap as well, so that isinstance
    alone would stop at them.
    """
    while optimizer is not None:
        inside = getattr(optimizer, "__dict__", {})
        wrapped = inside.get("_optimizer") or inside.get("optimizer")
        if wrapped is None or type(optimizer).__module__.startswith("gmc_cuda."):
            return optimizer if isinstance(optimizer, _OWN) else None
        optimizer = wrapped
    return None


def require_own(optimizers: Iterable[Any], name: str, line: str) -> None:
    """Raises ValueError for an optimizer that a framework's integration cannot train with.

    For one that is not of gmc_cuda nobody would communicate. A NodeAverage has a part of the state
    on each worker of a node, and frameworks save rank 0's alone.

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
    """Makes one worker's state the state of all, before it is saved. All workers call it.

    Args:
        optimizer: also inside a framework's wrapper. One that is not of gmc_cuda is left alone.

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
    """local_gradients() of a model that a framework has wrapped, if there is a DDP in it.

    With one worker, or a strategy of its own, a framework may have left it out.
    """
    from torch.nn.parallel import DistributedDataParallel

    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        local_gradients(model)


def share_scale(scaler: Any, name: str, line: str) -> None:
    """Makes a framework's GradScaler gmc_cuda's, with the scale that it has.

    Frameworks keep it in several places, some of which they have handed out already, so that the
    object stays and changes its class.

    Args:
        scaler: None where nothing is scaled.
        name: what the framework calls it.
        line: how a user hands the framework a gmc_cuda.GradScaler.

    Raises:
        TypeError: it is of another class, whose methods would be lost.
    """
    if scaler is None or isinstance(scaler, GradScaler):
        return
    # torch.cuda.amp.GradScaler and torch.cpu.amp.GradScaler add a constructor only.
    module, base = type(scaler).__module__, torch.amp.GradScaler
    if type(scaler) is not base and not (isinstance(scaler, base) and module in _OLD_NAMES):
        raise TypeError(
            f"{name}: got {module}.{type(scaler).__name__}, must be a "
            "torch.amp.GradScaler, which is then replaced, or a gmc_cuda.GradScaler, with which "
            f"the workers agree on the scale. Write\n    {line}"
        )
    scaler.__class__ = GradScaler


def refuse_with_overlap(optimizer: Any, options: dict[str, tuple[Any, bool]]) -> None:
    """Raises ValueError if a framework would clip or accumulate gradients that are sent already.

    Args:
        options: the framework's options by name: their value, and whether it does so.
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
