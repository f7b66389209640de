"""Reads checkpoints of format 2, which were written by torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import engine, names
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.shards import shard_of

FORMAT = 2


def readers(
    part: Path, facts: dict[str, Any], model: torch.nn.Module, optimizer: CompressedSGD, shard: str
) -> tuple[dict[str, Any], Callable[[int], dict[str, Tensor]]]:
    """The content of ``shared.pt``, and a function that reads one worker's own. No collective."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    params = [shard_of(param) for param in engine.params_of(optimizer)]

    def wanted(shared: bool) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": torch.empty(param.shape, dtype=torch.float32, device="cpu")
            for i, (param, held) in enumerate(zip(params, facts["held"], strict=True))
            for name, is_shared in held.items()
            if is_shared == shared and param.numel()
        }

    def private(rank: int) -> dict[str, Tensor]:
        return _read(part, f"worker{rank}{shard}", wanted(shared=False))

    template = {
        name: torch.empty_like(value) if isinstance(value, Tensor) else value
        for name, value in get_model_state_dict(model).items()
    }
    found = _read(part, "model", template)
    plain = names.plain_names(found)
    momentum = _read(part, f"shared{shard}", wanted(shared=True))
    tensors = {plain[k]: shard_of(v) for k, v in found.items() if isinstance(v, Tensor)}
    rest = {plain[k]: v for k, v in found.items() if not isinstance(v, Tensor)}
    return {"model": tensors, "not tensors": rest, "momentum": momentum}, private


def _read(part: Path, key: str, template: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    if template:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp_load({key: template}, checkpoint_id=part, no_dist=True)
    return template
