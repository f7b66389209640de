"""GMC in Hugging Face Accelerate.

torchrun --nproc-per-node=2 examples/with_accelerate.py --folder run [--resume]
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import gmc_cuda
from gmc_cuda.integrations.accelerate import leave_gradients_to_optimizer


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
    checkpoint = options.folder / "state"

    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = make_model()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.3, momentum=0.5, density=0.02)
    loader = torch.utils.data.DataLoader(windows(), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    leave_gradients_to_optimizer(accelerator, model)

    done = 0
    if options.resume:
        accelerator.load_state(str(checkpoint))
        done = options.save_every
    losses = {}
    batches = iter(accelerator.skip_first_batches(loader, 4 * done))
    for step in range(done + 1, options.steps + 1):
        total = 0.0
        for _ in range(4):
            batch = next(batches)
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / 4
        losses[step] = total
        if step == options.save_every and not options.resume:
            accelerator.save_state(str(checkpoint))
    if accelerator.is_main_process:
        (options.folder / "losses.json").write_text(json.dumps(losses))
    accelerator.end_training()


if __name__ == "__main__":
    main()
