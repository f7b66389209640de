"""Checks of what users pass to an optimizer: options, param groups, parameters, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmc_cuda import reference
from gmc_cuda._engine.bucket import DTYPES, MAX_NUMEL, is_dense_layout

DENSITY = 0.01  # the default, if there is no bytes_ratio
_DTYPE_NAMES = "torch.float32, torch.bfloat16 or torch.float16"


class Option(NamedTuple):
    """A numeric option in a param group.

    Attributes:
        within: returns whether a value is in range.
        range_name: the range in words, for errors.
        neutral: the value that changes nothing, for optimizers without the option.
        tensor: whether it may also be a tensor that holds one number.
        of_the_rule: whether ops.compress_ has an argument of the same name.
    """

    within: Callable[[float], bool]
    range_name: str
    neutral: float | None
    tensor: bool = False
    of_the_rule: bool = False


OPTIONS = {
    "lr": Option(lambda x: 0 <= x < math.inf, "at least 0", 1.0, tensor=True),
    "momentum": Option(
        lambda x: 0 <= x < 1, "at least 0 and below 1", 0.0, tensor=True, of_the_rule=True
    ),
    "weight_decay": Option(lambda x: 0 <= x < math.inf, "at least 0", 0.0, of_the_rule=True),
    "memory_decay": Option(
        lambda x: 0 <= x <= 2, "at least 0 and at most 2", 1.0, of_the_rule=True
    ),
    "density": Option(lambda x: 0 < x <= 1, "above 0 and at most 1", DENSITY),
    "bytes_ratio": Option(lambda x: 1 <= x < math.inf, "at least 1", None),
}


EXCHANGES = ("all_gather", "reduce_scatter")


def check_options(
    wire_dtype: torch.dtype,
    overlap: bool,
    bucket_cap_mb: float | None,
    nonfinite: str,
    check_replicas_every: int,
    exchange: str,
) -> None:
    check_flag(overlap, "overlap")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: got {exchange!r}, must be {' or '.join(map(repr, EXCHANGES))}")
    if wire_dtype not in reference.WIRE_DTYPES:
        *names, last = map(str, reference.WIRE_DTYPES)
        raise TypeError(f"wire_dtype: got {wire_dtype}, must be {', '.join(names)} or {last}")
    if bucket_cap_mb is not None:
        check_positive(bucket_cap_mb, "bucket_cap_mb", "number of MiB")
    if nonfinite not in ("skip", "raise"):
        raise ValueError(f"nonfinite: got {nonfinite!r}, must be 'skip' or 'raise'")
    whole = isinstance(check_replicas_every, int) and not isinstance(check_replicas_every, bool)
    if not whole or check_replicas_every < 0:
        raise ValueError(
            f"check_replicas_every: got {check_replicas_every!r}, must be a number of steps, or 0 "
            "for never"
        )


def check_positive(value: Any, name: str, what: str) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, must be a positive {what}")


def one_budget(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with None for density or bytes_ratio where the other one is given."""
    density, ratio = options.get("density"), options.get("bytes_ratio")
    if ratio is not None:
        if density not in (None, DENSITY):
            raise ValueError(
                f"bytes_ratio: got {ratio} beside density={density}, must be given in its place"
            )
        return {**options, "density": None}
    return options if density is None else {**options, "bytes_ratio": None}


_FLAGS = ("maximize", "nesterov", "momentum_masking")


def check_flag(value: Any, *name: str) -> None:
    if not isinstance(value, int):  # bool is one
        raise TypeError(f"{' '.join(name)}: got {value!r}, must be True or False")


def check_group(group: dict[str, Any], where: str) -> None:
    """Raises for options out of range. Each step calls it, since schedulers change options.

    Args:
        where: names the group in errors.
    """
    unused = "density" if group.get("bytes_ratio") is not None else "bytes_ratio"
    for name, option in OPTIONS.items():
        if name != unused:
            _check_range(group[name], option, name, where)
    for name in _FLAGS:
        check_flag(group.get(name, False), name, where)
    if group.get(unused) is not None:
        raise ValueError(
            f"density {where}: got {group['density']} beside bytes_ratio={group['bytes_ratio']}, "
            "must be None; to use the density set bytes_ratio to None"
        )


def check_param(param: Tensor, name: str) -> None:
    """Raises unless a parameter can be trained. ``name`` is its name in errors."""
    if param.layout != torch.strided:
        raise TypeError(f"{name}: got layout {param.layout}, must be dense (torch.strided)")
    if param.dtype not in DTYPES:
        raise TypeError(f"{name}: got {param.dtype}, must be {_DTYPE_NAMES}")
    if param.numel() > MAX_NUMEL:
        raise ValueError(f"{name}: got {param.numel()} elements, must be at most 2**31 - 1")
    if not is_dense_layout(param):
        raise ValueError(
            f"{name}: got strides {param.stride()} for shape {tuple(param.shape)}, must fill its "
            "storage without gaps (contiguous, channels_last or another permutation)"
        )


def is_trainable(param: Tensor) -> bool:
    """Whether a parameter passes :func:`check_param`."""
    try:
        check_param(param, "")
    except (TypeError, ValueError):
        return False
    return True


def refuse_gradient(grad: Tensor, name: str) -> None:
    """Raises TypeError for a gradient that is sparse or of an unknown dtype."""
    what = f"gradient of {name}"
    if grad.layout != torch.strided:
        raise TypeError(
            f"{what}: got layout {grad.layout}, must be dense (torch.strided); for embeddings use "
            "sparse=False"
        )
    raise TypeError(f"{what}: got {grad.dtype}, must be {_DTYPE_NAMES}")


def check_scaler(scaled: bool, together: bool, size: int, overlap: bool) -> None:
    """Raises RuntimeError for a GradScaler that cannot work here.

    torch's own keeps a scale on each worker, and the scales would drift apart.

    Args:
        scaled: whether a scaler calls step().
        together: whether it is a gmc_cuda.GradScaler, which keeps the workers' scales equal.
    """
    if scaled and size > 1 and not together:
        raise RuntimeError(
            "torch.amp.GradScaler with more than one worker would let the workers' loss scales "
            "drift apart: use gmc_cuda.GradScaler in its place, or bfloat16 autocast, which needs "
            "no scaler. In Trainer, Accelerate, Lightning and Fabric gmc_cuda.integrations does it."
        )
    if scaled and overlap:
        raise RuntimeError("GradScaler needs overlap=False: the scale is known only at step()")


def _check_range(value: Any, option: Option, name: str, where: str) -> None:
    if isinstance(value, Tensor) and option.tensor:
        if value.numel() != 1:
            raise ValueError(f"{name} {where}: got shape {tuple(value.shape)}, must be one number")
        if not value.is_cpu:
            return  # reading it could make the host wait for the device
        value = value.item()
    if not _is_number(value):
        what = "a number or a tensor" if option.tensor else "a number"
        raise TypeError(f"{name} {where}: got {type(value).__name__}, must be {what}")
    if not option.within(value):
        raise ValueError(f"{name} {where}: got {value}, must be {option.range_name}")


def as_float(value: Any) -> Any:
    """An option as the operators take it: an integer tensor becomes a floating-point one."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.double()
    return value


def _is_number(value: Any) -> bool:
    # isinstance of an abstract class takes ten times as long as this first test.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
