"""The ranges of a bucket in two-sided compression: rank j owns the j-th."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

UNIT = 8  # ranges begin at multiples of it, which keeps 16-byte loads of 16-bit values aligned


class Range(NamedTuple):
    """Elements begin to end - 1 of a bucket's index space; empty if begin == end."""

    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@lru_cache(maxsize=4096)
def cut(numel: int, size: int) -> tuple[Range, ...]:
    """Cuts N elements into one contiguous range for each rank.

    The ranges have the same number of elements, a multiple of UNIT, except that the last ones may
    be shorter or empty.

    Args:
        numel: N.
        size: world size p.
    """
    width = -(-numel // (size * UNIT)) * UNIT
    bounds = [min(j * width, numel) for j in range(size + 1)]
    return tuple(map(Range, bounds[:-1], bounds[1:]))


def within(sizes: Sequence[int], of: Range) -> list[tuple[int, int, int]]:
    """The tensors that have elements in a range.

    Args:
        sizes: the tensors' numels, in the order of the index space.

    Returns:
        For each such tensor its index in the list, and the bounds first and last: its elements
        first to last - 1 lie in the range.
    """
    return _within(tuple(sizes), of)


@lru_cache(maxsize=4096)  # each step asks for the same ranges of the same tensors
def _within(sizes: tuple[int, ...], of: Range) -> list[tuple[int, int, int]]:
    found, begin = [], 0
    for i, size in enumerate(sizes):
        first, last = max(of.begin - begin, 0), min(of.end - begin, size)
        if first < last:
            found.append((i, first, last))
        begin += size
    return found
