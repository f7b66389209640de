"""Device meshes over a pool's workers, made once in each process."""

from __future__ import annotations

import functools

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all workers. All of them must ask for it, in the same order of shapes.

    Every process group that gloo makes has threads that wake a hundred times a second until the
    process ends, so a mesh for each test makes all tests after it slower.
    """
    return init_device_mesh("cpu", shape, mesh_dim_names=names)
