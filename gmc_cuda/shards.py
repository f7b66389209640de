"""Parameters that are sharded inside a node: their local part, and who the workers are.

FSDP2 keeps each parameter as a DTensor over the workers of a node and averages gradients among
them. GMC then works on the local shards, with the workers that hold the same shard in other nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """A DTensor's local part, sharing its storage; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local().detach()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def groups_of(process_group: Any) -> tuple[Any, Any]:
    """(workers to train with, workers that share the verdict) of a process group or device mesh.

    Args:
        process_group: a process group, None, a 1-D mesh, or a 2-D mesh whose first dimension goes
            across nodes and whose second lies inside one.
    """
    if not hasattr(process_group, "mesh_dim_names"):
        return process_group, None
    if process_group.ndim > 2:
        raise ValueError(
            f"process_group: got a mesh of {process_group.ndim} dimensions, must have one, or two: "
            "across nodes, then inside a node"
        )
    inside = process_group.get_group(1) if process_group.ndim == 2 else None
    return process_group.get_group(0), inside


def check(params: Sequence[Tensor], process_group: Any, overlap: bool) -> Any:
    """The process group over which these parameters are sharded; None if they are not.

    Raises:
        ValueError: shards that an optimizer over this group cannot work on, with the reason.
    """
    sharded: list[Any] = [p for p in params if is_sharded(p)]
    if not sharded:
        return None
    if len(sharded) < len(params):
        raise ValueError(
            "params: got some that are DTensors and some that are not; shard all of them "
            "(fully_shard on the whole model), or use an optimizer for each kind"
        )
    mesh = sharded[0].device_mesh
    if any(p.device_mesh != mesh for p in sharded):
        raise ValueError("params: got DTensors on different meshes, must be on one")
    if any(place.is_replicate() for p in sharded for place in p.placements) or mesh.ndim > 1:
        raise ValueError(
            f"params: got DTensors with placements {sharded[0].placements}. Where a parameter is "
            "replicated, its gradient is averaged before this optimizer sees it: shard inside the "
            "node only, and hand the whole mesh to the optimizer:\n"
            "    fully_shard(model, mesh=mesh['shard'])\n"
            "    gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
        )
    if process_group is None:
        raise ValueError(
            "process_group: got None for sharded parameters, must say which workers hold the same "
            "shard: process_group=mesh, with mesh = init_device_mesh(device, (nodes, workers in a "
            "node), mesh_dim_names=('replicate', 'shard')). Sharded over all workers there is "
            "nothing to compress"
        )
    if overlap:
        raise ValueError(
            "overlap: got True, but FSDP announces no gradients to hooks: use overlap=False"
        )
    return mesh.get_group()
