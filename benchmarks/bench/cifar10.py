"""CIFAR-10 from its original files (the "python version"), and ResNet-20 for it.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"; He, Zhang, Ren, Sun, "Deep
Residual Learning for Image Recognition", section 4.2: the setting of the papers on GMC and DGC.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compare_methods.digits import partition
from compare_methods.task import Task, split

TRAIN, TEST = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAD = 4
# All that a pickled array of the files is made of; anything else could run code.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which CIFAR-10's files do not")
        return super().find_class(module, name)


def load(rank: int, world: int, non_iid: bool, folder: Path) -> Task:
    images, labels = read(folder, TRAIN)
    held_images, held_labels = read(folder, TEST)
    # The files are shuffled, so any part of them holds all classes.
    mine = partition(labels, rank, world, non_iid)
    part = split(len(held_labels), rank, world)

    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = mine[torch.randint(len(mine), (size,), generator=generator)]
        return augmented(images[chosen], generator), labels[chosen]

    return Task(
        title="CIFAR-10: ResNet-20",
        data=f"{len(labels)} images to train on, {len(held_labels)} held out; "
        f"{'few' if non_iid else 'all'} classes on each worker",
        make_model=ResNet20,
        batch=batch,
        test=(normalized(held_images[part]), held_labels[part]),
        unit="image",
    )


def read(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """(uint8 [n, 3, 32, 32], int64 [n])"""
    images, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"--data {folder}: has no file {name}; it must be cifar-10-batches-py, unpacked "
                "from the python version at https://www.cs.toronto.edu/~kriz/cifar.html"
            )
        try:
            with path.open("rb") as file:
                content = _Reader(file, encoding="bytes").load()
            data = torch.from_numpy(content[b"data"])
            images.append(data.reshape(-1, 3, 32, 32))
            labels.append(torch.tensor(content[b"labels"]))
            whole = len(images[-1]) == len(labels[-1]) and data.dtype == torch.uint8
        except Exception as error:
            raise ValueError(f"--data {folder}: {name} is damaged: {error}") from error
        if not whole:
            raise ValueError(f"--data {folder}: {name} is damaged: images and labels do not match")
    return torch.cat(images), torch.cat(labels)


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels, every second one mirrored."""
    count = len(images)
    padded = F.pad(normalized(images), [PAD] * 4)
    shift = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator)
    rows, columns = shift + torch.arange(32)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    moved = padded[image, :, rows[:, :, None], columns[:, None]]  # channels come last
    return moved.permute(0, 3, 1, 2)


class ResNet20(nn.Sequential):
    """float32 [batch, 3, 32, 32] -> logits [batch, 10]; 0.27 million parameters, BatchNorm."""

    def __init__(self) -> None:
        blocks, inputs = [], 16
        for width in (16, 32, 64):
            for number in range(3):
                blocks.append(Block(inputs, width, 2 if number == 0 and width > 16 else 1))
                inputs = width
        stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        super().__init__(*stem, *blocks, *head)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters, as in section 4.2."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - inputs
        self.path = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.path(x) + F.pad(shortcut, [0, 0, 0, 0, 0, self.more]))
