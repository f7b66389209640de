"""What a run must not go on without noticing: damaged payloads, and later replicas that differ.

On the CPU a damaged payload raises where it is read. Kernels cannot raise: they set a flag in the
aggregate and do nothing else. The flags are copied to the host behind the step and looked at when
they have arrived, which is usually at the next step.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from gmc_cuda import ops


class DamageWatch:
    """The flags of steps whose outcome the host has not seen yet."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def submit(self, aggregates: list[Tensor]) -> None:
        """Starts copying the flags of CUDA aggregates to the host."""
        if torch.cuda.is_current_stream_capturing():
            return  # a replay runs no Python that could look at them
        flags = ops.aggregate_flags(aggregates)
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flags.device))
        self._waiting.append((event, host))

    def check(self, rank: int) -> None:
        """Raises RuntimeError if a step that has ended met a damaged payload."""
        if not self._waiting or torch.cuda.is_current_stream_capturing():
            return  # asking after an event would end the capture
        while self._waiting and self._waiting[0][0].query():
            _, flags = self._waiting.popleft()
            if (flags & ops.DAMAGED).any():
                raise RuntimeError(
                    f"rank {rank} received a damaged payload in an earlier step and did not apply "
                    "it; replicas may differ: restart from a checkpoint"
                )
