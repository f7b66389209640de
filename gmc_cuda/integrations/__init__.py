"""GMC inside training frameworks: one module for each, which imports it.

Frameworks wrap the model in DistributedDataParallel and save the optimizer of rank 0 alone. Each
module here makes that DDP local and averages memory before a save, so that rank 0's state is
everybody's.
"""

from __future__ import annotations

from typing import Any

from gmc_cuda.compressed_sgd import CompressedSGD
from gmc_cuda.local_updates import LocalUpdates


def settle(optimizer: Any) -> None:
    """Makes one worker's state the state of all, before it is saved. All workers call it.

    Args:
        optimizer: also inside a framework's wrapper. One that is not of gmc_cuda is left alone.
    """
    while not isinstance(optimizer, (CompressedSGD, LocalUpdates)):
        optimizer = getattr(optimizer, "optimizer", getattr(optimizer, "_optimizer", None))
        if optimizer is None:
            return
    if isinstance(optimizer, LocalUpdates):
        optimizer.synchronize()
    optimizer.average_memory_()
