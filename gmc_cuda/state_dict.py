"""What an optimizer's buckets hold, parameter by parameter: for state_dict and for repacking.

torch.optim casts loaded state to the parameter's dtype, which would round the float32 memory of a
bfloat16 parameter, and knows nothing of buckets. So the loaded tensors are kept aside before torch
casts them and copied into the buckets afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmc_cuda.buckets import Bucket

if TYPE_CHECKING:
    from gmc_cuda.compressed_sgd import CompressedSGD

ParamState = dict[str, Tensor]


def export(buckets: list[Bucket]) -> dict[Tensor, ParamState]:
    """Each parameter's memory, momentum buffer and part of the aggregate, shaped like it."""
    exported: dict[Tensor, ParamState] = {}
    for bucket in buckets:
        flats = {
            "memory": bucket.memory,
            "momentum_buffer": bucket.momentum_buffer,
            "aggregate": bucket.dense_aggregate(),
        }
        for name, flat in flats.items():
            if flat is not None:
                for param, view in zip(bucket.params, bucket.views(flat), strict=True):
                    exported.setdefault(param, {})[name] = view
    return exported


def install(optimizer: CompressedSGD, saved: dict[Tensor, ParamState]) -> None:
    """Copies what export() gave into the optimizer's buckets and points its state at them."""
    optimizer.state.clear()
    for bucket in optimizer._buckets:
        flats = {"memory": bucket.memory}
        if bucket.momentum_buffer is not None:
            flats["momentum_buffer"] = bucket.momentum_buffer
        for name, flat in flats.items():
            for param, view in zip(bucket.params, bucket.views(flat), strict=True):
                if name in saved.get(param, {}):
                    view.copy_(saved[param][name])
                optimizer.state[param][name] = view
        if any("aggregate" in saved.get(param, {}) for param in bucket.params):
            aggregate = torch.zeros_like(bucket.memory)
            for param, view in zip(bucket.params, bucket.views(aggregate), strict=True):
                if "aggregate" in saved.get(param, {}):
                    view.copy_(saved[param]["aggregate"])
            bucket.aggregate = aggregate
    # Frozen parameters are in no bucket; what they hold waits until they are unfrozen.
    for param, state in saved.items():
        if param not in optimizer._bucket_of:
            optimizer.state[param] = state


def attach(optimizer: CompressedSGD) -> None:
    """Makes state_dict() hold the aggregate, and load_state_dict() load without rounding."""
    optimizer.register_state_dict_post_hook(_add_aggregate)
    optimizer.register_load_state_dict_pre_hook(_keep_loaded)
    optimizer.register_load_state_dict_post_hook(_install_loaded)


def _add_aggregate(optimizer: CompressedSGD, state_dict: dict[str, Any]) -> None:
    exported = export(optimizer._buckets)
    for i, param in enumerate(_params(optimizer)):
        if "aggregate" in exported.get(param, {}):
            flat = exported[param]["aggregate"].reshape(-1)
            indices = flat.nonzero().view(-1)
            state = dict(state_dict["state"][i])
            state_dict["state"][i] = state
            state["aggregate_indices"] = indices
            state["aggregate_values"] = flat[indices]


def _keep_loaded(optimizer: CompressedSGD, state_dict: dict[str, Any]) -> None:
    optimizer._refuse_between_backward_and_step("load_state_dict")
    params = list(_params(optimizer))
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(params):
        return  # torch itself says what is wrong
    optimizer._loaded = {
        param: _checked(state_dict["state"][i], param, i, optimizer._local_momentum)
        for i, param in zip(ids, params, strict=True)
        if i in state_dict["state"]
    }


def _install_loaded(optimizer: CompressedSGD) -> None:
    for bucket in optimizer._buckets:
        bucket.memory.zero_()
        if bucket.momentum_buffer is not None:
            bucket.momentum_buffer.zero_()
        bucket.aggregate = None
    install(optimizer, optimizer.__dict__.pop("_loaded"))


def _checked(loaded: dict[str, Tensor], param: Tensor, i: int, local_momentum: bool) -> ParamState:
    state: ParamState = {}
    wanted = ["memory"] + ["momentum_buffer"] * local_momentum
    for name in wanted:
        if name not in loaded:
            raise ValueError(f"state_dict: parameter {i} has no '{name}', but {sorted(loaded)}")
        if loaded[name].shape != param.shape:
            raise ValueError(
                f"state_dict: {name} of parameter {i} has shape {tuple(loaded[name].shape)}, must "
                f"be {tuple(param.shape)}"
            )
        state[name] = loaded[name]
    if "aggregate_indices" in loaded and not local_momentum:
        aggregate = torch.zeros(param.numel(), device=param.device)
        indices = loaded["aggregate_indices"].to(param.device)
        aggregate[indices] = loaded["aggregate_values"].to(param.device)
        state["aggregate"] = aggregate.view(param.shape)
    return state


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
