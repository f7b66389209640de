"""How many entries a step sends, and whether a dense all-reduce would be cheaper."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache

import torch

from gmc_cuda import ops


def entries(
    density: float | None,
    bytes_ratio: float | None,
    numel: int,
    wire_dtype: torch.dtype,
    times: float = 1.0,
) -> int:
    """K, how many of its numel entries a bucket sends by a density or a bytes_ratio.

    Args:
        density, bytes_ratio: one of them; the other is None or ignored.
        times: how many times more bytes a link carries for payloads than for a ring all-reduce of
            the same size. For payloads of n bytes an all-gather carries (p-1) n and a ring
            2 (p-1)/p n, so it is p / 2. A single worker sends nothing, and counts as one of two.
    """
    if bytes_ratio is None:
        assert density is not None
        return entries_at(density, numel)
    return numel if bytes_ratio == 1 else entries_within(bytes_ratio * times, numel, wire_dtype)


def entries_at(density: float, numel: int) -> int:
    """K = max(1, ceil(density * N))."""
    return max(1, math.ceil(density * numel))


@lru_cache(maxsize=4096)
def payload_nbytes(numel: int, k: int, wire_dtype: torch.dtype) -> int:
    """``ops.payload_nbytes``, cached."""
    return ops.payload_nbytes(numel, k, wire_dtype)


@lru_cache(maxsize=4096)
def aggregate_nbytes(numel: int, k: int, size: int) -> int:
    """Bytes of the aggregate that ``ops.merge`` makes of `size` payloads."""
    nbytes: int = torch.ops.gmc_cuda.aggregate_nbytes(numel, k, size)
    return nbytes


@lru_cache(maxsize=4096)
def entries_within(bytes_ratio: float, numel: int, wire_dtype: torch.dtype) -> int:
    """The largest K whose payload has at most 1 / bytes_ratio of a float32 gradient's bytes.

    A bucket so small that no payload fits sends the entries that fit into the smallest payload.
    K = N means a dense float32 all-reduce, so it is chosen only where 4 * N bytes fit.
    """
    budget = max(4 * numel / bytes_ratio, payload_nbytes(numel, 1, wire_dtype))
    if 4 * numel <= budget:
        return numel
    fitting = bisect_right(
        range(1, numel), budget, key=lambda k: ops.payload_nbytes(numel, k, wire_dtype)
    )
    return max(1, fitting)


def ring_nbytes(nbytes: int, size: int) -> int:
    """Bytes that a link carries, in each direction, for a ring all-reduce of `nbytes`."""
    return 2 * (size - 1) * nbytes // size


def dense_is_cheaper(numel: int, k: int, link_nbytes: int, size: int) -> bool:
    """Whether a dense all-reduce of a bucket is cheaper than sending K entries.

    Args:
        numel: N, elements of the bucket.
        k: entries that would be sent otherwise.
        link_nbytes: bytes that a link would carry otherwise, in the busier direction.
        size: world size p. A single worker sends nothing, and is dense only if k = N.
    """
    return k == numel or (size > 1 and link_nbytes >= ring_nbytes(4 * numel, size))
