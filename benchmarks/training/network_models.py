"""The models whose steps benchmarks/training/network.py and time_to_loss.py measure."""

from typing import NamedTuple

import torch
from torch import nn

from examples.demo import text


class Model(NamedTuple):
    width: int
    layers: int
    batch: int  # windows of 64 bytes, of a worker and step

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return text.Transformer(self.width, self.layers)

    def facts(self) -> dict:
        sizes = [param.numel() for param in self.make().parameters()]
        return {"parameters": sum(sizes), "tensors": len(sizes), "batch": self.batch}


MODELS = {"large": Model(384, 6, 1), "text": Model(text.WIDTH, text.LAYERS, 4)}
