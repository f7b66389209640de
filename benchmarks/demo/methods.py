"""The four methods of the papers, as optimizers of gmc_cuda.

One param group for everything: biases and norms lie in the same bucket as the weights and compete
with them for the K entries sent. (A second group with density=1.0 would send them dense.)
"""

import argparse

import gmc_cuda
import torch
from torch import nn

LABELS = {"dmsgd": "dense momentum SGD", "gmc": "GMC", "dgc": "DGC", "memsgd": "memory SGD"}
WARMUP_DENSITY = 0.25


def make(method: str, model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    common = {
        "lr": options.lr,
        "momentum": options.momentum,
        "weight_decay": options.weight_decay,
        "density": 1.0 if method == "dmsgd" else options.density,
        "wire_dtype": getattr(torch, options.wire_dtype),
    }
    if method in ("dmsgd", "gmc"):
        return gmc_cuda.GMC(model.parameters(), **common)
    return gmc_cuda.DGC(model.parameters(), momentum_masking=method == "dgc", **common)


def make_schedulers(method: str, optimizer, options: argparse.Namespace) -> list:
    """What is stepped after every optimizer step: stagewise lr, density warm-up."""
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, options.schedule, gamma=options.gamma)
    ]
    if options.warmup and method != "dmsgd":
        schedulers.append(
            gmc_cuda.DensityWarmup(optimizer, options.warmup, start=WARMUP_DENSITY)
        )
    return schedulers
