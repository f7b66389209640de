"""GMC in Lightning Fabric.

torchrun --nproc-per-node=2 examples/with_fabric.py --folder run [--resume]
"""

import argparse
import json
import sysconfig
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import nn

import gmc_cuda
from gmc_cuda.integrations.fabric import GMCFabricStrategy


def windows():
    """Windows of 17 bytes of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 17 * 8000].view(-1, 17).long()


def make_model():
    """Predicts a byte from the 16 before it."""
    return nn.Sequential(
        nn.Embedding(256, 16), nn.Flatten(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 256)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    checkpoint = options.folder / "state.ckpt"

    fabric = lightning.Fabric(
        strategy=GMCFabricStrategy(),
        accelerator="auto",
        devices=2,
        precision="bf16-mixed",
    )
    fabric.launch()  # before the optimizer, which looks for the other workers
    torch.manual_seed(0)
    model = make_model()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.3, momentum=0.5, density=0.02)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(windows(), batch_size=16))

    done = 0
    if options.resume:
        fabric.load(checkpoint, {"model": model, "optimizer": optimizer})
        done = options.save_every
    losses = {}
    batches = iter(loader)
    for _ in range(4 * done):
        next(batches)
    for step in range(done + 1, options.steps + 1):
        total = 0.0
        for part in range(4):
            batch = next(batches)
            with fabric.no_backward_sync(model, enabled=part < 3):
                loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
                fabric.backward(loss / 4)
            total += loss.item() / 4
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = total
        if step == options.save_every and not options.resume:
            fabric.save(checkpoint, {"model": model, "optimizer": optimizer})
    if fabric.is_global_zero:
        (options.folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
