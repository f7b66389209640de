"""Parameters that are sharded inside a node: this worker's shard, and the groups of workers.

FSDP2 and tensor parallelism keep each parameter as a DTensor over the workers of a node. GMC then
works on each worker's shard, together with the workers that hold the same shard in other nodes.
With FSDP's first version (use_orig_params=True) the parameters are themselves the shards.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def shard_of(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this worker, sharing its storage; any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local().detach()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP's first version owns this parameter, and cuts shards out of a flat tensor."""
    return getattr(tensor, "_fsdp_flattened", False)


def place(params: Sequence[Tensor], inside: Any) -> tuple[int, int] | None:
    """Which shard of the parameters this worker holds, of how many; None if it holds them whole.

    The parts of FSDP's first version count as whole, because torch gathers and cuts their state by
    itself; so do NodeAverage's, whose states say by themselves whose they are.

    Args:
        inside: the workers that hold the other shards; None if parameters are not sharded.
    """
    cut = any(is_sharded(p) and not p.placements[0].is_replicate() for p in params)  # type: ignore[attr-defined]
    if not cut or inside is None or dist.get_world_size(inside) == 1:
        return None
    return dist.get_rank(inside), dist.get_world_size(inside)


class Parts:
    """What NodeAverage hands on as process_group: its plain tensors are parts, by this 2-D mesh."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh


def groups_of(process_group: Any) -> tuple[Any, Any]:
    """The group to train with, and the group whose workers hold the other shards (or None).

    Args:
        process_group: a process group, None, a 1-D mesh, or a 2-D mesh whose first dimension goes
            across nodes and whose second lies inside one.
    """
    if isinstance(process_group, Parts):
        process_group = process_group.mesh
    if process_group is None:
        return None, None
    if not hasattr(process_group, "mesh_dim_names"):
        outside = dist.GroupMember.NON_GROUP_MEMBER  # refused later, by its own error
        if isinstance(process_group, dist.ProcessGroup) or process_group == outside:
            return process_group, None
        raise TypeError(
            f"process_group: got {process_group!r}, must be a process group of torch.distributed, "
            "a device mesh, or None"
        )
    if process_group.ndim > 2:
        raise ValueError(
            f"process_group: got a mesh of {process_group.ndim} dimensions, must have one, or two: "
            "across nodes, then inside a node"
        )
    inside = process_group.get_group(1) if process_group.ndim == 2 else None
    return process_group.get_group(0), inside


def check(params: Sequence[Tensor], process_group: Any, inside_node: Any, overlap: bool) -> Any:
    """The process group over which these parameters are sharded; None if they are not sharded.

    Args:
        process_group: across nodes.
        inside_node: the workers inside a node, if each must hold other shards; None for a group
            without a mesh, and for :class:`Parts`.

    Raises:
        ValueError: an optimizer over this group cannot train such shards.
    """
    if any(is_sharded(p) for p in params):
        inside = _group_of_dtensors(params)
    elif any(is_flattened(p) for p in params):
        inside = _group_of_fsdp1(params)
    else:
        if params and inside_node is not None and dist.get_world_size(inside_node) > 1:
            raise ValueError(
                "process_group: got a mesh of two dimensions for parameters that are not sharded, "
                "of which the workers of a node would then have different ones. Shard them:\n"
                "    fully_shard(model, mesh=mesh[mesh.mesh_dim_names[1]])\n"
                "or, where every worker has the whole model, use\n"
                "    gmc_cuda.NodeAverage(model.parameters(), make, mesh)\n"
                "For shards of your own, process_group=mesh.get_group(0)"
            )
        return None
    if process_group is None:
        raise ValueError(
            "process_group: got None for sharded parameters, must say which workers hold the same "
            "shard: process_group=mesh, with mesh = init_device_mesh(device, (nodes, workers in a "
            "node), mesh_dim_names=('replicate', 'shard')). A model that is sharded over all "
            "workers has no replicas, so there is nothing to compress"
        )
    ranks = set(dist.get_process_group_ranks(process_group))
    if len(ranks & set(dist.get_process_group_ranks(inside))) > 1:
        raise ValueError(
            f"process_group: got ranks {sorted(ranks)}, some of which hold different shards of a "
            "parameter, must be those that hold the same: shard inside the node only, and hand the "
            "whole mesh, (nodes, workers in a node), to the optimizer:\n"
            "    fully_shard(model, mesh=mesh['shard'])\n"
            "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
        )
    if overlap:
        raise ValueError(
            "overlap: got True, but FSDP announces no gradients to hooks: use overlap=False"
        )
    return inside


def _group_of_dtensors(params: Sequence[Tensor]) -> Any:
    sharded: list[Any] = [p for p in params if is_sharded(p)]
    if len(sharded) < len(params):
        raise ValueError(
            "params: got some that are DTensors and some that are not; shard all of them "
            "(fully_shard on the whole model), or use an optimizer for each kind"
        )
    mesh = sharded[0].device_mesh
    if any(p.device_mesh != mesh for p in sharded):
        raise ValueError("params: got DTensors on different meshes, must be on one")
    replicated = [p for p in sharded if p.placements[0].is_replicate()]
    if mesh.ndim == 1 and 0 < len(replicated) < len(sharded):
        raise ValueError(
            "params: got DTensors of which some are sharded and some replicated inside the node, "
            "as in tensor parallelism. What is sent of a parameter depends on the others in its "
            "bucket, so the replicas would drift apart: give the replicated ones an optimizer of "
            "their own:\n"
            "    whole = [p for p in model.parameters() if p.placements[0].is_replicate()]\n"
            "    gmc_cuda.GMC(whole, lr, process_group=mesh)"
        )
    if mesh.ndim == 2 and replicated:
        raise ValueError(
            f"params: got DTensors with placements {replicated[0].placements}. Where a parameter "
            "is replicated, its gradient is averaged before this optimizer sees it: shard inside "
            "the node only, and hand the whole mesh to the optimizer:\n"
            "    fully_shard(model, mesh=mesh['shard'])\n"
            "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
        )
    if mesh.ndim > 1:
        raise ValueError(
            f"params: got DTensors with placements {sharded[0].placements}, must be sharded over "
            "one dimension of a mesh: by FSDP or by tensor parallelism, not by both"
        )
    return mesh.get_group()


def _group_of_fsdp1(params: Sequence[Tensor]) -> Any:
    """FullyShardedDataParallel's parameters are plain tensors, each a part of a flat shard."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    own, group = {id(p) for p in params}, None
    for fsdp in gc.get_objects():  # a parameter has no reference to its module
        if not issubclass(type(fsdp), FullyShardedDataParallel):
            continue
        if not any(id(p) in own for p in fsdp.parameters()):
            continue
        group, strategy = fsdp.process_group, fsdp.sharding_strategy
        shards_only = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
        if strategy not in shards_only and dist.get_world_size(group) > 1:
            raise ValueError(
                f"params: got parameters of FullyShardedDataParallel with {strategy.name}, which "
                "averages gradients between replicas before this optimizer sees them: shard inside "
                "the node only, and hand the whole mesh to the optimizer:\n"
                "    FullyShardedDataParallel(model, process_group=mesh.get_group('shard'), "
                "use_orig_params=True)\n"
                "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
            )
    if group is None:
        raise ValueError(
            "params: the FullyShardedDataParallel that owned these parameters was deleted"
        )
    return group


def shard_of_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The shard of a gradient that belongs to the parameter's shard on this worker."""
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return shard_of(grad)
