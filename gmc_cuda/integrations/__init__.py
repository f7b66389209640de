"""GMC inside training frameworks: one module for each, which imports it.

Frameworks wrap the model in DistributedDataParallel and save the optimizer of rank 0 alone. Each
module here makes that DDP local and averages memory before a save, so that rank 0's state is
everybody's.
"""

from __future__ import annotations

from typing import Any

from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda.local_updates import LocalUpdates


def unwrap(optimizer: Any) -> CompressedSGD | LocalUpdates | None:
    """The optimizer inside a framework's wrappers; None if it is not of gmc_cuda."""
    while not isinstance(optimizer, (CompressedSGD, LocalUpdates)):
        optimizer = getattr(optimizer, "optimizer", getattr(optimizer, "_optimizer", None))
        if optimizer is None:
            return None
    return optimizer


def settle(optimizer: Any) -> None:
    """Makes one worker's state the state of all, before it is saved. All workers call it.

    Args:
        optimizer: also inside a framework's wrapper. One that is not of gmc_cuda is left alone.
    """
    found = unwrap(optimizer)
    if isinstance(found, LocalUpdates):
        found.synchronize()
    if found is not None:
        found.average_memory_()


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
