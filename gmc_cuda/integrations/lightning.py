"""GMC inside Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from gmc_cuda.ddp import local_gradients
from gmc_cuda.integrations import settle


class GMCStrategy(DDPStrategy):
    """DDPStrategy that leaves the gradients to the optimizer, and averages memory before a save.

    ::

        trainer = lightning.Trainer(strategy=GMCStrategy(), devices=2, gradient_clip_val=1.0)

    with a GMC or DGC in ``configure_optimizers``. Arguments: those of DDPStrategy. Gradient
    clipping clips each worker's own gradient.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        local_gradients(self.model)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        for optimizer in self.optimizers:
            settle(optimizer)  # before the parameters are read, which a LocalUpdates changes
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        settle(optimizer)
        return super().optimizer_state(optimizer)
