"""The search for a method's best momentum and learning rate: for convergence.py.

Points are (momentum, lr / (1 - momentum)). The second is how far one gradient moves the parameters
in the end; at the same value of it the best momentum changes little else, so the two are looked for
one along the other.
"""

import math
from collections.abc import Callable

MOMENTA = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
FINALISTS = 4  # of a search, unless said otherwise


def search(
    loss: Callable[[float, float], float],
    momentum: float,
    scaled: float,
    momenta: list[float],
    fixed: bool,
    finalists: int = FINALISTS,
) -> list[tuple[float, float]]:
    """(momentum, lr) of the lowest loss(momentum, lr), and of the others among the finalists.

    What lies beside the best two has been tried: the next lower and higher of `momenta`, and
    learning rates half and twice as high, and half-way to those. With `fixed` only the start is.
    """
    momenta = sorted(momenta)
    found: dict[tuple[int, int], float] = {}

    def place(point: tuple[int, int]) -> tuple[float, float]:
        m = momenta[point[0]]
        return m, float(f"{scaled * 2.0 ** (point[1] / 2) * (1 - m):.6g}")

    start = (momenta.index(momentum), 0)
    untried: tuple[int, int] | None = start
    while untried is not None:
        found[untried] = loss(*place(untried))
        ranking = sorted(found, key=found.__getitem__)
        # The best so far comes first, so that a valley is walked down, not surveyed.
        beside = [p for best in ranking[:2] for p in _beside(*best, len(momenta)) if not fixed]
        untried = next((point for point in beside if point not in found), None)
    if math.isinf(found[ranking[0]]):
        raise RuntimeError(f"diverged at the start, momentum and lr {place(start)}, and beside it")
    return [place(point) for point in ranking[:finalists] if math.isfinite(found[point])]


def _beside(row: int, half: int, rows: int) -> list[tuple[int, int]]:
    places = [(row, half + 2), (row, half - 2), (row - 1, half), (row + 1, half)]
    places += [(row, half + 1), (row, half - 1)]
    return [point for point in places if 0 <= point[0] < rows]
