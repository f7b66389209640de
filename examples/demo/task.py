"""What a task consists of, seen from one worker."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Task:
    title: str  # "Text: byte-level transformer"
    data: str  # one line: what was read, how it was split
    make_model: Callable[..., nn.Module]  # text's takes a width
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # this worker's training data
    test: tuple[Tensor, Tensor]  # this worker's part of the held-out examples
    unit: str  # what accuracy counts: "next byte", "image"

    def to(self, device: torch.device) -> "Task":
        inputs, targets = self.test
        self.test = inputs.to(device), targets.to(device)
        return self


def split(count: int, rank: int, world: int) -> slice:
    """The rank-th of `world` contiguous parts of range(count), equal in size within one."""
    return slice(count * rank // world, count * (rank + 1) // world)
