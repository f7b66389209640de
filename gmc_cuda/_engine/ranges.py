"""The ranges of a bucket in two-sided compression: rank j owns the j-th."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from torch import Tensor

UNIT = 8  # ranges begin at multiples of it, so that 16-byte loads of 16-bit gradients stay aligned

T = TypeVar("T", bound="Tensor | None")


class Range(NamedTuple):
    """Elements begin to end - 1 of a bucket's index space; empty ones have begin == end."""

    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@lru_cache(maxsize=4096)
def cut(numel: int, size: int) -> tuple[Range, ...]:
    """Cuts N elements into one contiguous range for each rank.

    All have the same number of elements, a multiple of UNIT, but for the last that is not empty,
    which may be shorter, and what comes after it, which is empty.

    Args:
        numel: N.
        size: world size p.
    """
    width = -(-numel // (size * UNIT)) * UNIT
    bounds = [min(j * width, numel) for j in range(size + 1)]
    return tuple(map(Range, bounds[:-1], bounds[1:]))


def within(sizes: Sequence[int], of: Range) -> list[tuple[int, int, int]]:
    """Which tensors of a list have elements in a range, and which of theirs.

    Args:
        sizes: the tensors' numels, in the order of the index space.

    Returns:
        for each of them its place in the list, and its first and last element but one.
    """
    found, begin = [], 0
    for i, size in enumerate(sizes):
        first, last = max(of.begin - begin, 0), min(of.end - begin, size)
        if first < last:
            found.append((i, first, last))
        begin += size
    return found


def slices(tensors: Sequence[T], sizes: Sequence[int], of: Range) -> list[T]:
    """The parts of flat tensors, or None, that lie in a range."""
    return [
        tensor if tensor is None else tensor.view(-1)[first:last]  # type: ignore[misc]
        for i, first, last in within(sizes, of)
        for tensor in (tensors[i],)
    ]
