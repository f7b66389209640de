"""The four methods of the papers, as optimizers of gmc_cuda.

One param group for everything: biases and norms lie in the same bucket as the weights and compete
with them for the K entries sent. (A second group with density=1.0 would send them dense.)
"""

import argparse
import math
from typing import Any

import torch
from torch import nn

import gmc_cuda

LABELS = {"dmsgd": "dense momentum SGD", "gmc": "GMC", "dgc": "DGC", "memsgd": "memory SGD"}
LR_WARMUP = 0.1  # of the steps
WARMUP_DENSITY, WARMUP_STAGES = 0.25, 4  # as DGC's 25, 6.25, 1.56, 0.4, then 0.1 percent


def make(method: str, model: nn.Module, options: argparse.Namespace) -> gmc_cuda.GMC | gmc_cuda.DGC:
    sent: dict[str, Any] = {"density": 1.0}
    if method != "dmsgd":
        sent = {"density": options.density}
        if options.density is None:
            sent = {"bytes_ratio": options.bytes_ratio}
        sent["exchange"] = options.exchange
    common = {
        **options.tuned[method],
        **sent,
        "weight_decay": options.weight_decay,
        "wire_dtype": getattr(torch, options.wire_dtype),
    }
    if method in ("dmsgd", "gmc"):
        return gmc_cuda.GMC(model.parameters(), **common)
    return gmc_cuda.DGC(model.parameters(), momentum_masking=method == "dgc", **common)


def make_schedulers(
    method: str, optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> list[tuple]:
    """(n, scheduler): the scheduler is stepped after every n-th optimizer step."""
    rates = torch.optim.lr_scheduler
    lr: rates.LRScheduler
    if options.schedule is None:
        lr = rates.LambdaLR(optimizer, lambda step: share_of_lr(step, options.steps, LR_WARMUP))
    else:
        lr = rates.MultiStepLR(optimizer, options.schedule, options.gamma)
    schedulers: list[tuple] = [(1, lr)]
    if options.warmup and method != "dmsgd":
        warmup = gmc_cuda.DensityWarmup(optimizer, WARMUP_STAGES, WARMUP_DENSITY)
        schedulers.append((math.ceil(options.warmup / WARMUP_STAGES), warmup))
    return schedulers


def share_of_lr(step: int, steps: int, warmup: float) -> float:
    """Up linearly over the first `warmup` of the steps, down as a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))
