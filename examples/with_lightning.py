"""GMC in Lightning.

torchrun --nproc-per-node=2 examples/with_lightning.py --folder run [--resume]
"""

import argparse
import json
import sysconfig
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import gmc_cuda
from gmc_cuda.integrations.lightning import GMCStrategy


class NextByte(lightning.LightningModule):
    """Predicts a byte from the 16 before it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Embedding(256, 16), nn.Flatten(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 256)
        )
        self.losses = {}

    def configure_optimizers(self):
        return gmc_cuda.GMC(self.parameters(), lr=0.3, momentum=0.5, density=0.02)

    def training_step(self, batch, i):
        loss = F.cross_entropy(self.net(batch[:, :-1]), batch[:, -1])
        step = self.global_step + 1
        self.losses[step] = self.losses.get(step, 0.0) + loss.item() / 4
        return loss


def windows():
    """Windows of 17 bytes of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 17 * 8000].view(-1, 17).long()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = NextByte()
    loader = torch.utils.data.DataLoader(windows(), batch_size=16)
    # Saves at the last batch of an epoch: Lightning resumes with the first batch of one.
    trainer = lightning.Trainer(
        strategy=GMCStrategy(),
        accelerator="auto",
        devices=2,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accumulate_grad_batches=4,
        max_steps=options.steps,
        limit_train_batches=4 * options.save_every,
        callbacks=[
            ModelCheckpoint(
                options.folder,
                filename="{step}",
                save_top_k=-1,
                every_n_train_steps=options.save_every,
            )
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = options.folder / f"step={options.save_every}.ckpt"
    trainer.fit(model, loader, ckpt_path=str(checkpoint) if options.resume else None)
    if trainer.is_global_zero:
        (options.folder / "losses.json").write_text(json.dumps(model.losses))


if __name__ == "__main__":
    main()
