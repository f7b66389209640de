"""Compares the model and hyperparameters of all ranks.

Ranks that differ would wait for each other for ever, or misread each other's payloads. So each rank
sends the others its facts, or the error that it met, and if they differ every rank raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.meeting import meet

_SHOWN = 5
_COMPARABLE = (int, float, complex, str, tuple, Tensor, type(None))


def describe(
    optimizer: torch.optim.Optimizer, options: Iterable[str] | None = None
) -> dict[str, Any]:
    """The facts that must be equal on all ranks, by the name under which errors report them.

    Args:
        options: names of the param group's options to compare; other keys are the user's own.
            None, for an optimizer that is not gmc_cuda's: all options that can be compared.
    """
    facts: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "number of param groups": len(optimizer.param_groups),
    }
    for g, group in enumerate(optimizer.param_groups):
        facts[f"number of parameters in group {g}"] = len(group["params"])
        for name in (
            sorted(group.keys() - {"params", "param_names"}) if options is None else options
        ):
            value = group[name]
            if options is None and not isinstance(value, _COMPARABLE):
                continue
            facts[f"{name} of group {g}"] = value.tolist() if isinstance(value, Tensor) else value
        for i, param in enumerate(group["params"]):
            name = parameter_name(group, i)
            facts[f"shape of {name}, group {g}"] = tuple(param.shape)
            facts[f"dtype of {name}, group {g}"] = str(param.dtype)
            facts[f"requires_grad of {name}, group {g}"] = param.requires_grad
    return facts


def parameter_name(group: dict[str, Any], i: int) -> str:
    """The name of a group's i-th parameter in errors."""
    names = group.get("param_names")
    return f"parameter {i} ('{names[i]}')" if names else f"parameter {i}"


def require_equal(
    exchange: Exchange,
    facts: dict[str, Any] | Exception,
    device: torch.device,
    own: int = 0,
    call: str = "add_param_group()",
    inside: Exchange | None = None,
) -> int:
    """Raises on every rank unless all ranks pass equal facts. Collective.

    Args:
        facts: from :func:`describe`, or the exception that this rank met before.
        device: where the parameters are.
        own: a number that need not be equal.
        call: what all workers must call, for the error of a worker that calls it alone.
        inside: for the workers of all nodes: this node's, where ``exchange`` goes across nodes.
            Ranks are then those of the mesh.

    Returns:
        Rank 0's ``own``.

    Raises:
        ValueError: the facts differ.
        RuntimeError: another rank met an exception; this rank's own is raised as it is.
    """
    failed = repr(facts) if isinstance(facts, Exception) else None
    answers = [(failed or facts, own)]
    place, exchanges = "comparison", [exchange]
    if inside is not None:
        place, exchanges = "comparison of all nodes", [inside, exchange]
    for part in exchanges:
        try:
            meet(part, call, place)
        except Exception as error:
            if isinstance(facts, Exception):
                raise facts from error
            raise
        answers = list(chain.from_iterable(part.gather_objects(answers, device)))
    if isinstance(facts, Exception):
        raise facts
    everyone: list[Any] = [answer for answer, _ in answers]
    for rank, other in enumerate(everyone):
        if isinstance(other, str):
            raise RuntimeError(f"rank {rank} could not set its optimizer up: {other}")
    found = differences(everyone)
    if found:
        raise ValueError(
            "all ranks must train the same model with the same hyperparameters, but they differ "
            f"in:{found}"
        )
    return answers[0][1]


def differences(everyone: list[dict[str, Any]]) -> str:
    """One line for each fact that differs from rank 0's; empty if none does."""
    found = [
        f"{name}: {_show(everyone[0], name)} on rank 0, {_show(other, name)} on rank {rank}"
        for rank, other in enumerate(everyone)
        for name in {**everyone[0], **other}
        if _show(everyone[0], name) != _show(other, name)
    ]
    more = len(found) - _SHOWN
    shown = found[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return "".join(f"\n  {line}" for line in shown)


def _show(facts: dict[str, Any], name: str) -> str:
    return repr(facts[name]) if name in facts else "nothing"
