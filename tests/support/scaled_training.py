"""Trains in a framework with torch's GradScaler as the framework makes it for float16.

    torchrun --nproc-per-node=2 scaled_training.py framework folder

Frameworks make a scaler on a GPU only, so that it is handed to them here, on the CPU. Each worker
writes what it met to folder/<rank>.json.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import gmc_cuda

FRAMEWORK, FOLDER = sys.argv[1], Path(sys.argv[2])
STEPS, OVERFLOW_AT = 6, 3
RANK = int(os.environ["RANK"])
CLIP = 0.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x, y, overflow=None):
        loss = nn.functional.cross_entropy(self.net(x).float(), y)
        return {"loss": loss * overflow.float().mean()}


def data(overflows):
    """One example for each step and worker; that of rank 1 at OVERFLOW_AT has no finite loss."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for step in range(1, STEPS + 1):
        for rank in range(2):
            x = torch.randn(16, generator=generator)
            bad = overflows and (step, rank) == (OVERFLOW_AT, 1)
            factor = torch.tensor(float("inf") if bad else 1.0)
            rows.append({"x": x, "y": torch.tensor(step % 4), "overflow": factor})
    return rows


def make_optimizer(params):
    return gmc_cuda.GMC(params, lr=0.1, density=0.2)


def by_transformers(scaler, overflows):
    from transformers import Trainer, TrainingArguments

    from gmc_cuda.integrations.transformers import GMCCallback

    arguments = TrainingArguments(
        output_dir=str(FOLDER), max_steps=STEPS, per_device_train_batch_size=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", label_names=["y"],
        max_grad_norm=CLIP, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        average_tokens_across_devices=False, remove_unused_columns=False,
    )  # fmt: skip
    model = Model()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data(overflows),
        optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.1, "density": 0.2}),
    )
    accelerator = trainer.accelerator
    hand_to_accelerator(accelerator, scaler)
    trainer.add_callback(GMCCallback(trainer))
    scheduled = []
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda count: scheduled.append(count) or 1.0
    )
    trainer.train()
    return model, trainer.optimizer.optimizer, accelerator.scaler, (len(scheduled) - 1) // 2


# Of what by_transformers and by_accelerate return, the last is the steps of the learning rate's
# schedule: it counted once at construction, and Accelerate makes one for each of the two workers.


def hand_to_accelerator(accelerator, scaler):
    """What its constructor does for mixed_precision="fp16" on a GPU."""
    accelerator.scaler = scaler
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


def by_accelerate(scaler, overflows):
    from accelerate import Accelerator

    from gmc_cuda.integrations.accelerate import leave_gradients_to_optimizer

    accelerator = Accelerator(cpu=True)
    hand_to_accelerator(accelerator, scaler)
    inner = Model()
    optimizer = make_optimizer(inner.parameters())
    scheduled = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: scheduled.append(count) or 1.0
    )
    loader = torch.utils.data.DataLoader(data(overflows), batch_size=1)
    model, optimizer, loader, scheduler = accelerator.prepare(inner, optimizer, loader, scheduler)
    leave_gradients_to_optimizer(accelerator, model)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
    return inner, optimizer.optimizer, accelerator.scaler, (len(scheduled) - 1) // 2


def by_lightning(scaler, overflows, package="lightning.pytorch"):
    pl = importlib.import_module(package)
    amp = importlib.import_module(f"{package}.plugins.precision.amp")
    mine = "pytorch_lightning" if package == "pytorch_lightning" else "lightning"
    strategy = importlib.import_module(f"gmc_cuda.integrations.{mine}").GMCStrategy

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def configure_optimizers(self):
            return make_optimizer(self.parameters())

        def training_step(self, batch, i):
            return self.model(**batch)["loss"]

    plugin = amp.MixedPrecision("16-mixed", "cpu", scaler)
    module = Module()
    trainer = pl.Trainer(
        strategy=strategy(), accelerator="cpu", devices=2, max_steps=STEPS, plugins=[plugin],
        gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(overflows), batch_size=1))
    return module.model, trainer.optimizers[0], plugin.scaler, None


def by_fabric(scaler, overflows, package="lightning.fabric"):
    name = "lightning_fabric" if package == "lightning_fabric" else "fabric"
    strategy = importlib.import_module(f"gmc_cuda.integrations.{name}").GMCFabricStrategy
    amp = importlib.import_module(f"{package}.plugins.precision.amp")
    fabric = importlib.import_module(package).Fabric(
        strategy=strategy(), accelerator="cpu", devices=2,
        plugins=[amp.MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    fabric.launch()
    inner = Model()
    model, optimizer = fabric.setup(inner, make_optimizer(inner.parameters()))
    loader = torch.utils.data.DataLoader(data(overflows), batch_size=1)
    for batch in fabric.setup_dataloaders(loader):
        optimizer.zero_grad()
        fabric.backward(model(**batch)["loss"])
        fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
        optimizer.step()
    return inner, optimizer.optimizer, fabric.strategy.precision.scaler, None


TRAIN = {
    "transformers": by_transformers,
    "accelerate": by_accelerate,
    "lightning": by_lightning,
    "fabric": by_fabric,
    "pytorch_lightning": lambda *a: by_lightning(*a, "pytorch_lightning"),
    "lightning_fabric": lambda *a: by_fabric(*a, "lightning_fabric"),
}[FRAMEWORK]


def main():
    met = {}
    for name, scale, overflows in (
        ("small scale", 1.0, False), ("large scale", 256.0, False), ("overflow", 256.0, True),
    ):  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        model, optimizer, scaler, scheduled = TRAIN(scaler, overflows)
        met[name] = {
            "scaler": f"{type(scaler).__module__}.{type(scaler).__name__}",
            "scale": scaler.get_scale(),
            "skipped": optimizer.stats()["skipped_steps"],
            "steps": optimizer.stats()["steps"],
            "parameters": [x for p in model.parameters() for x in p.detach().flatten().tolist()],
            "largest memory": max(s["memory"].abs().max().item() for s in optimizer.state.values()),
            "scheduled": scheduled,
        }
    (FOLDER / f"{RANK}.json").write_text(json.dumps(met))


if __name__ == "__main__":
    main()
