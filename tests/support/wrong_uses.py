"""Uses a framework wrongly and prints what that met: wrong_uses.py framework how folder."""

import os
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import gmc_cuda

FRAMEWORK, HOW, FOLDER = sys.argv[1:]
OVERLAP = HOW in ("clips", "clips by hand", "accumulates")
OPTIONS = {"lr": 0.1, "density": 0.1, "overlap": OVERLAP}
# No one communicates for it.
MAKE = torch.optim.SGD if HOW == "takes another optimizer" else gmc_cuda.GMC
if MAKE is torch.optim.SGD:
    OPTIONS = {"lr": 0.1}
CLIP, ACCUMULATE = 1.0 if HOW == "clips" else 0.0, 2 if HOW == "accumulates" else 1


def say(what):
    """In one piece: the workers share one output, which another's line may have left half-way."""
    os.write(1, f"\nmet {what} end\n".encode())


class Model(nn.Module):
    """What Trainer wants: a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))

    def forward(self, x, y):
        return {"loss": nn.functional.cross_entropy(self.net(x), y)}


DATA = [{"x": torch.randn(64), "y": torch.tensor(i % 3)} for i in range(32)]


def transformers():
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gmc_cuda.integrations.transformers import GMCCallback

    class Late(TrainerCallback):
        """Asks for a checkpoint when GMCCallback has been asked already."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    arguments = TrainingArguments(
        output_dir=FOLDER, max_steps=3, max_grad_norm=CLIP, gradient_accumulation_steps=ACCUMULATE,
        label_names=["y"], per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="best" if HOW == "saves the best" else "no",
        **(best if HOW == "saves the best" else {}),
        **({"enable_jit_checkpoint": True} if HOW == "saves at a signal" else {}),
    )  # fmt: skip
    trainer = Trainer(
        Model(),
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA,
        optimizer_cls_and_kwargs=(MAKE, OPTIONS),
    )
    if HOW != "communicates":
        trainer.add_callback(GMCCallback(trainer))
    if HOW == "saves alone":
        trainer.add_callback(Late())
    trainer.train()
    if HOW == "saves the best":  # which is right
        (saved, *_) = sorted(Path(FOLDER).glob("checkpoint-*/optimizer.pt"))
        assert torch.load(saved)["param_groups"][0]["saved_by"]["averaged"]
        say("nothing")


def accelerate():
    from accelerate import Accelerator

    from gmc_cuda.integrations.accelerate import leave_gradients_to_optimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = Model()
    optimizer = MAKE(model.parameters(), **OPTIONS)
    loader = torch.utils.data.DataLoader(DATA, batch_size=2)
    if HOW == "comes too early":
        leave_gradients_to_optimizer(accelerator, model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if HOW == "saves alone":
        gmc_cuda.local_gradients(model)
    elif HOW == "names no model":
        leave_gradients_to_optimizer(accelerator)
    elif HOW != "communicates":
        leave_gradients_to_optimizer(accelerator, model)
    for batch in loader:
        accelerator.backward(model(**batch)["loss"])
        if CLIP:
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    if HOW == "names no model":  # which is right
        say("nothing")
    if HOW == "saves alone":
        accelerator.save_state(FOLDER)
        accelerator.wait_for_everyone()
        accelerator.load_state(FOLDER)


def lightning():
    import lightning as L

    from gmc_cuda.integrations.lightning import GMCStrategy

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.automatic_optimization = HOW != "clips by hand"

        def configure_optimizers(self):
            return MAKE(self.parameters(), **OPTIONS)

        def training_step(self, batch, i):
            loss = self.model(**batch)["loss"]
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
            return loss

    L.Trainer(
        strategy="ddp" if HOW == "communicates" else GMCStrategy(),
        accelerator="cpu", devices=2, max_steps=3, gradient_clip_val=CLIP or None,
        accumulate_grad_batches=ACCUMULATE, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), torch.utils.data.DataLoader(DATA, batch_size=2))  # fmt: skip


def fabric():
    import lightning as L

    from gmc_cuda.integrations.fabric import GMCFabricStrategy

    strategy = "ddp" if HOW in ("communicates", "saves alone") else GMCFabricStrategy()
    fabric = L.Fabric(strategy=strategy, accelerator="cpu", devices=2)
    fabric.launch()
    trained = []
    for overlap in (OVERLAP, False):
        model = Model()
        options = OPTIONS | ({} if MAKE is torch.optim.SGD else {"overlap": overlap})
        wrapped, optimizer = fabric.setup(model, MAKE(model.parameters(), **options))
        if HOW == "saves alone":
            gmc_cuda.local_gradients(wrapped)
        loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(DATA, batch_size=2))
        for i, batch in enumerate(loader, 1):
            last = i % ACCUMULATE == 0
            with fabric.no_backward_sync(wrapped, enabled=not last):
                fabric.backward(wrapped(**batch)["loss"])
            if last:
                if CLIP:
                    fabric.clip_gradients(wrapped, optimizer, max_norm=CLIP)
                optimizer.step()
                optimizer.zero_grad()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if HOW == "accumulates":  # which is right, also with overlap
        say("nothing" if torch.equal(*trained) else "other weights with overlap")
    if HOW == "saves alone":
        fabric.save(f"{FOLDER}/state", {"optimizer": optimizer})
        fabric.load(f"{FOLDER}/state", {"optimizer": optimizer})


def main():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            {
                "transformers": transformers,
                "accelerate": accelerate,
                "lightning": lightning,
                "fabric": fabric,
            }[FRAMEWORK]()
        except (ValueError, RuntimeError) as error:
            say(f"{type(error).__name__}: {error}")
    for warning in caught:
        ours = "the checkpoint of step|this optimizer is rank|enable_jit"
        if re.search(ours, str(warning.message)):
            say(f"{warning.category.__name__}: {warning.message}")


if __name__ == "__main__":
    main()
