"""GMC inside transformers.Trainer."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import Trainer, TrainerCallback

from gmc_cuda.integrations import refuse_with_overlap, require_own, settle, silence_ddp, unwrap
from gmc_cuda.integrations.accelerate import share_accelerators_scale


class GMCCallback(TrainerCallback):
    """Leaves the gradients to the optimizer, and averages its memory before each checkpoint.

    ::

        trainer = Trainer(model, args, train_dataset=data,
                          optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.1, "density": 0.01}))
        trainer.add_callback(GMCCallback(trainer))

    Add it last, because it acts on checkpoints that callbacks before it have requested. Gradient
    clipping clips each worker's own gradient. With ``fp16=True`` the trainer's GradScaler becomes a
    :class:`gmc_cuda.GradScaler`.

    Args:
        trainer: the Trainer that it is added to.

    Raises:
        ValueError: when training begins, if the optimizer is not gmc_cuda's, or has overlap=True
            while gradients are clipped or accumulated.
        TypeError: when training begins, if the GradScaler is of a class that is neither torch's nor
            gmc_cuda's.

    Warns:
        UserWarning: a checkpoint was written without what other workers had not sent, or
            enable_jit_checkpoint is to write one so.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._settled_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_own(
            [self._trainer.optimizer],
            "the Trainer's optimizer",
            'optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.1})',
        )
        clipping, steps = args.max_grad_norm, args.gradient_accumulation_steps
        refuse_with_overlap(
            self._trainer.optimizer,
            {
                "max_grad_norm": (clipping, bool(clipping)),
                "gradient_accumulation_steps": (steps, steps > 1),
            },
        )
        share_accelerators_scale(self._trainer.accelerator, "trainer.accelerator")
        silence_ddp(self._trainer.model_wrapped)
        if getattr(args, "enable_jit_checkpoint", False) and args.world_size > 1:
            # Each worker decides alone when to write it, so they may not meet to average memory.
            warnings.warn(
                "enable_jit_checkpoint: got True, must be False on several workers: its checkpoint "
                "would have rank 0's memory only, without what the other workers had not sent. "
                "Write\n    TrainingArguments(..., enable_jit_checkpoint=False)",
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._settle(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._settle(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy == "best":  # the Trainer decides after this event, and calls no other
            self._settle(state)

    def _settle(self, state: Any) -> None:
        settle(self._trainer.optimizer)
        self._settled_at = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved_alone = self._settled_at != state.global_step and args.world_size > 1
        if saved_alone and unwrap(self._trainer.optimizer) is not None:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has rank 0's memory only: what the "
                "other workers had not sent is not in it. A callback requested it after "
                "GMCCallback: add that one before\n"
                "    trainer.add_callback(GMCCallback(trainer))",
                stacklevel=2,
            )
