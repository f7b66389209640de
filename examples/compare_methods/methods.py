"""The four methods of the papers, as optimizers of gmc_cuda.

One param group for everything: biases and norms lie in the same bucket as the weights and compete
with them for the K entries sent. (A second group with density=1.0 would send them dense.)
"""

import argparse
import math

import torch
from torch import nn

import gmc_cuda

LABELS = {"dmsgd": "dense momentum SGD", "gmc": "GMC", "dgc": "DGC", "memsgd": "memory SGD"}
WARMUP_DENSITY, WARMUP_STAGES = 0.25, 4  # as DGC's 25, 6.25, 1.56, 0.4, then 0.1 percent


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


def make_schedulers(method: str, optimizer, options: argparse.Namespace) -> list[tuple]:
    """(n, scheduler): the scheduler is stepped after every n-th optimizer step."""
    stagewise = torch.optim.lr_scheduler.MultiStepLR(optimizer, options.schedule, options.gamma)
    schedulers = [(1, stagewise)]
    if options.warmup and method != "dmsgd":
        warmup = gmc_cuda.DensityWarmup(optimizer, WARMUP_STAGES, WARMUP_DENSITY)
        schedulers.append((math.ceil(options.warmup / WARMUP_STAGES), warmup))
    return schedulers
