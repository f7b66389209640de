"""A model's buffers, which no optimizer of parameters sees."""

from __future__ import annotations

from typing import Any

import torch

from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.shards import shard_of


@torch.no_grad()
def broadcast_buffers(model: torch.nn.Module, process_group: Any = None) -> None:
    """Gives all workers rank 0's buffers: running statistics, random features. All must call it.

    Where DistributedDataParallel is left out, or made local by :func:`gmc_cuda.local_gradients`,
    each worker's BatchNorm goes by its own batches, and buffers that are drawn at random differ
    from the start. Call it after the model is made, and before it is evaluated or saved.

    Args:
        model: whose buffers, of any dtype, on one device, are overwritten in place.
        process_group: the optimizer's; a process group or a device mesh.
    """
    buffers = [shard_of(buffer).detach() for buffer in model.buffers() if buffer.numel()]
    flat = [buffer.contiguous() for buffer in buffers]
    # gloo and NCCL carry bytes, whatever a buffer's dtype.
    Exchange(process_group).broadcast([buffer.view(-1).view(torch.uint8) for buffer in flat])
    for buffer, values in zip(buffers, flat, strict=True):
        if values is not buffer:
            buffer.copy_(values)
