"""A training script as torchrun restarts it: it goes on from the disk, and sometimes dies.

    torchrun --nproc-per-node=2 --max-restarts=2 restarted_training.py FOLDER

It trains two models side by side. One has a file for each worker, the other (with overlap) a
gmc_cuda.checkpoint. At the end each worker leaves ``end-RANK.pt`` in the folder.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gmc_cuda

STEPS, SAVE_EVERY = 14, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Run:
    """A model, its optimizer and its scheduler."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(5)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(9, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Linear(24, 3)
        )
        self.optimizer = gmc_cuda.GMC(
            self.model.parameters(), lr=0.1, density=0.05, weight_decay=0.01,
            momentum_form="iterate", bucket_cap_mb=400 * 4 / 2**20, **options,
        )  # fmt: skip
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.8)

    def train(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(16, 9, generator=generator)
        self.optimizer.zero_grad()
        (self.model(x) - x[:, :3]).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }


class OneFileAWorker(Run):
    """Each worker writes a file under another name and then renames it, so that none is half."""

    def save(self, folder: Path, step: int, dies: bool) -> None:
        path = folder / f"{step}-{dist.get_rank()}.pt"
        part = path.with_suffix(".part")
        torch.save(self.state(), part)
        if dies:
            part.write_bytes(part.read_bytes()[:1000])
            die()
        os.replace(part, path)

    def load(self, folder: Path) -> int:
        """Workers may have died before the others wrote: the last step that all have counts."""
        own = {int(path.stem.split("-")[0]) for path in folder.glob(f"*-{dist.get_rank()}.pt")}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        step = max(set.intersection(*everyone), default=0)
        if step:
            state = torch.load(folder / f"{step}-{dist.get_rank()}.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        return step


class Checkpointed(Run):
    def save(self, folder: Path, step: int) -> None:
        extra = {"step": step, "scheduler": self.scheduler.state_dict()}
        gmc_cuda.checkpoint.save(folder, self.model, self.optimizer, extra)

    def load(self, folder: Path) -> int:
        try:
            extra = gmc_cuda.checkpoint.load(folder, self.model, self.optimizer)
        except FileNotFoundError:
            return 0
        self.scheduler.load_state_dict(extra["scheduler"])
        return extra["step"]


def train(folder: Path, life: int | None) -> list[dict[str, Tensor]]:
    """Trains to the end, or to the death of this life; None: nobody dies. Returns both states."""
    rank = dist.get_rank()
    files, checkpoint = OneFileAWorker(), Checkpointed(overlap=True)
    parts = folder / "files", folder / "checkpoint"
    parts[0].mkdir(exist_ok=True)
    starts = files.load(parts[0]), checkpoint.load(parts[1])
    if rank == 0:
        print(f"life {life} starts at {starts}", flush=True)
    for step in range(1, STEPS + 1):
        if step > starts[0]:
            files.train(step)
        if step > starts[1]:
            checkpoint.train(step)
        if step % SAVE_EVERY == 0:
            if (life, step, rank) == (0, 6, 1):  # rank 0 writes its file, and waits
                die()
            if step > starts[0]:
                files.save(parts[0], step, dies=(life, step, rank) == (1, 10, 0))
            if step > starts[1]:
                checkpoint.save(parts[1], step)
    return [run.state() for run in (files, checkpoint)]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save(
        train(folder, int(os.environ["TORCHELASTIC_RESTART_COUNT"])),
        folder / f"end-{dist.get_rank()}.pt",
    )
    dist.destroy_process_group()
