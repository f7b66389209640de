"""How much a step sends: entries of a payload, and whether a dense all-reduce costs less."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache

import torch

from gmc_cuda import ops

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float4_e2m1fn_x2,
)


def entries(
    density: float | None,
    bytes_ratio: float | None,
    numel: int,
    wire_dtype: torch.dtype,
    times: float = 1.0,
) -> int:
    """K: how many of numel entries a density or a bytes_ratio lets through.

    Args:
        density, bytes_ratio: one of them.
        times: a link carries as many times more of payloads than of a ring all-reduce of as many
            bytes. An all-gather: (p-1) n bytes for payloads of n, where the ring has 2 (p-1)/p n,
            so p / 2. A worker alone sends nothing and is taken for one of two.
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
    """``ops.payload_nbytes``, asked for once."""
    return ops.payload_nbytes(numel, k, wire_dtype)


@lru_cache(maxsize=4096)
def aggregate_nbytes(numel: int, k: int, size: int) -> int:
    """Bytes of what ``ops.merge`` makes of `size` payloads."""
    nbytes: int = torch.ops.gmc_cuda.aggregate_nbytes(numel, k, size)
    return nbytes


@lru_cache(maxsize=4096)
def entries_within(bytes_ratio: float, numel: int, wire_dtype: torch.dtype) -> int:
    """The largest K whose payload has at most 1 / bytes_ratio of a float32 gradient's bytes.

    A bucket too small for its framing sends what the smallest payload holds. K = N, which goes
    dense in float32, only where that is within the bytes.
    """
    budget = max(4 * numel / bytes_ratio, payload_nbytes(numel, 1, wire_dtype))
    if 4 * numel <= budget:
        return numel
    fitting = bisect_right(
        range(1, numel), budget, key=lambda k: ops.payload_nbytes(numel, k, wire_dtype)
    )
    return max(1, fitting)


def ring_nbytes(nbytes: int, size: int) -> int:
    """What a link carries, in each direction, of a ring all-reduce of that many bytes."""
    return 2 * (size - 1) * nbytes // size


def dense_is_cheaper(numel: int, k: int, link_nbytes: int, size: int) -> bool:
    """Whether a bucket goes by dense all-reduce.

    Args:
        numel: N, elements of the bucket.
        k: entries that would be sent otherwise.
        link_nbytes: what a link would carry otherwise, in the busier direction.
        size: world size p. A single worker sends nothing, so only k = N is dense there.
    """
    return k == numel or (size > 1 and link_nbytes >= ring_nbytes(4 * numel, size))
