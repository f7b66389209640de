"""How much a step sends: entries of a payload, and whether a dense all-reduce costs less."""

from __future__ import annotations

import math


def entries(density: float, numel: int) -> int:
    """K = max(1, ceil(density * N)): how many of a bucket's numel entries are sent."""
    return max(1, math.ceil(density * numel))


def dense_is_cheaper(numel: int, k: int, nbytes: int, size: int) -> bool:
    """Whether a bucket goes by dense all-reduce.

    A rank of a ring all-reduce receives 2 (p-1)/p * 4 N bytes, of an all-gather (p-1) * nbytes.

    Args:
        numel: N, elements of the bucket.
        k: entries that a payload would hold.
        nbytes: size of that payload.
        size: world size p. A single worker sends nothing, so only k = N is dense there.
    """
    return k == numel or (size > 1 and size * nbytes >= 8 * numel)
