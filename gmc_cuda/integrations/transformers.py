"""GMC inside transformers.Trainer."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from gmc_cuda.ddp import local_gradients
from gmc_cuda.integrations import settle


class GMCCallback(TrainerCallback):
    """Leaves the gradients to the optimizer, and averages its memory before each checkpoint.

    ::

        trainer = Trainer(model, args, train_dataset=data,
                          optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.1, "density": 0.01}))
        trainer.add_callback(GMCCallback(trainer))

    Add it last: it acts when a callback before it has asked for a checkpoint. Gradient clipping
    clips each worker's own gradient.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self._trainer.model_wrapped
        if isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel):
            local_gradients(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            settle(self._trainer.optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            settle(self._trainer.optimizer)
