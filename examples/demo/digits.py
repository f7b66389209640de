"""Small convolutional network on scikit-learn's digits (1,797 images of 8 x 8, bundled)."""

import torch
from torch import Tensor, nn

from examples.demo.task import Task, split

TEST_SHARE = 0.3


def load(rank: int, world: int, non_iid: bool) -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    # One fixed shuffle: every seed and every method sees the same held-out images.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test_count = int(TEST_SHARE * len(labels))
    test, train = order[:test_count], order[test_count:]
    mine = train[partition(labels[train], rank, world, non_iid)]
    held_out = test[split(test_count, rank, world)]

    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = mine[torch.randint(len(mine), (size,), generator=generator)]
        return images[chosen], labels[chosen]

    classes = "few classes on each worker" if non_iid else "all classes on each worker"
    return Task(
        title="Digits: convolutional network on scikit-learn's digits",
        data=f"{len(train)} images to train on, {test_count} held out; {classes}",
        make_model=make_model,
        batch=batch,
        test=(images[held_out], labels[held_out]),
        unit="image",
    )


def partition(labels: Tensor, rank: int, world: int, non_iid: bool) -> Tensor:
    """Positions in `labels` that belong to worker `rank`, int64.

    The parts are disjoint, cover everything and differ in size by at most one, so that the mean of
    the workers' losses is the loss on the whole. `non_iid` cuts the list sorted by class.
    """
    if world > len(labels):
        raise ValueError(f"digits has {len(labels)} training images, too few for {world} workers")
    order = torch.argsort(labels, stable=True) if non_iid else torch.arange(len(labels))
    return order[split(len(labels), rank, world)]


def make_model() -> nn.Module:
    """float32 [batch, 1, 8, 8] -> logits [batch, 10]. GroupNorm: no buffers to keep in step."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
