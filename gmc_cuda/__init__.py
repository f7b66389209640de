"""Global momentum compression for PyTorch: data-parallel training over slow networks.

GMC, DGC        optimizers: torch.optim.Optimizer over torch.distributed
DensityWarmup   a scheduler over their density
GradScaler      loss scaling for float16, agreed by all workers
broadcast_buffers  all workers get rank 0's buffers
local_gradients DistributedDataParallel leaves the gradients to the optimizer
gmc_hook        GMC as DistributedDataParallel's communication hook, with a GMCHookState
LocalUpdates    an exchange every H steps of another optimizer
NodeAverage     dense inside a node, GMC across nodes
integrations    Trainer, Accelerate, Lightning, Fabric: import gmc_cuda.integrations.<name>
checkpoint      save and load with every worker's memory, on any number of workers
advise          what a step takes with each method on this network, also as a command
info            how the extension was built, and a self-check: python -m gmc_cuda.info
ops             the functional layer, on CPU or CUDA tensors (also torch.ops.gmc_cuda.*)
reference       the operators in plain PyTorch, to read beside the papers
"""

import importlib
from typing import Any

from gmc_cuda import checkpoint, ops, reference
from gmc_cuda.amp import GradScaler
from gmc_cuda.buffers import broadcast_buffers
from gmc_cuda.ddp import GMCHookState, gmc_hook, local_gradients
from gmc_cuda.local_updates import LocalUpdates
from gmc_cuda.node_average import NodeAverage
from gmc_cuda.optim import DGC, GMC
from gmc_cuda.schedules import DensityWarmup

__version__ = "0.1.0"
__all__ = [
    "DGC",
    "GMC",
    "DensityWarmup",
    "GMCHookState",
    "GradScaler",
    "LocalUpdates",
    "NodeAverage",
    "broadcast_buffers",
    "checkpoint",
    "gmc_hook",
    "local_gradients",
    "ops",
    "reference",
]


def __getattr__(name: str) -> Any:
    # Not imported above, or `python -m gmc_cuda.advise` would warn that it is there twice.
    if name == "advise":
        return importlib.import_module("gmc_cuda.advise")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
