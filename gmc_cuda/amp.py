"""Loss scaling for float16 training on several workers."""

from __future__ import annotations

from typing import Any

import torch

from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda.node_average import NodeAverage


class GradScaler(torch.amp.GradScaler):
    """A torch.amp.GradScaler with which all workers skip a step, and change the scale, together.

    Use it as torch's: ``scaler.scale(loss).backward()``, ``scaler.step(optimizer)``,
    ``scaler.update()``, and ``scaler.unscale_(optimizer)`` before clipping. A worker whose
    gradients overflowed counts them as zero and says so in its payload, so that all workers skip
    the step and none waits for another. Unscaling is part of the pass over memory, so memory never
    holds scaled values.

    The arguments are those of :class:`torch.amp.GradScaler`. For an optimizer that is not a GMC,
    DGC or NodeAverage it behaves exactly like torch's; with LocalUpdates a worker skips its inner
    step alone.

    Raises:
        RuntimeError: ``step(optimizer)`` of an optimizer with ``overlap=True``.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if not isinstance(optimizer, (CompressedSGD, NodeAverage)) or not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        optimizer.engine.scaled_together = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.engine.scaled_together = False
            self._take_verdict(optimizer)

    def _take_verdict(self, optimizer: CompressedSGD | NodeAverage) -> None:
        """Makes update() follow the workers' verdict instead of this worker's own finding."""
        skipped = optimizer.last_step_skipped()
        if skipped is not None:
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            found.clear()
            found[skipped.device] = skipped.float()
