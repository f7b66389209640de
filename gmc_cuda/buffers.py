"""A model's buffers, which an optimizer does not see."""

from __future__ import annotations

from typing import Any

import torch

from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.meeting import meet
from gmc_cuda._engine.shards import shard_of


@torch.no_grad()
def broadcast_buffers(model: torch.nn.Module, process_group: Any = None) -> None:
    """Gives all workers rank 0's buffers, such as running statistics. All workers must call it.

    DistributedDataParallel broadcasts buffers. Without it, and after
    :func:`gmc_cuda.local_gradients`, each worker's BatchNorm follows its own batches, and buffers
    that are drawn at random differ from the beginning. Call this after the model is constructed,
    and before it is evaluated or saved.

    Args:
        model: the model, whose buffers (of any dtype, all on one device) are overwritten in place.
        process_group: a process group or a device mesh, the same as the optimizer's.

    Raises:
        RuntimeError: another worker did not call it within the time-out of the process group.
    """
    exchange = Exchange(process_group)
    meet(exchange, "broadcast_buffers()")
    buffers = [shard_of(buffer).detach() for buffer in model.buffers() if buffer.numel()]
    flat = [buffer.contiguous() for buffer in buffers]
    # Every backend broadcasts bytes, but not every dtype.
    exchange.broadcast([buffer.view(-1).view(torch.uint8) for buffer in flat])
    for buffer, values in zip(buffers, flat, strict=True):
        if values is not buffer:
            buffer.copy_(values)
