"""The search for a method's best momentum and learning rate: for benchmarks/convergence.py.

Points are (momentum, lr / (1 - momentum)). The second is how far one gradient moves the parameters
in the end; at the same value of it the best momentum changes little else, so the two are looked for
one along the other.
"""

import math
from collections.abc import Callable

MOMENTA = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]


FINALISTS = 2


def search(
    loss: Callable[[float, float], float],
    momentum: float,
    scaled: float,
    momenta: list[float],
    fixed: bool,
) -> list[tuple[float, float]]:
    """(momentum, lr) of the lowest loss(momentum, lr), and of the next lowest.

    The neighbours of the best point, the next lower and higher of `momenta` and half and twice the
    learning rate, have all been tried; then learning rates half-way to those last two. With
    `fixed` only the start is.
    """
    momenta = sorted(momenta)
    found: dict[tuple[int, int], float] = {}

    def value(point: tuple[int, int]) -> float:
        if point not in found:
            found[point] = loss(*place(point))
        return found[point]

    def place(point: tuple[int, int]) -> tuple[float, float]:
        m = momenta[point[0]]
        return m, float(f"{scaled * 2.0 ** (point[1] / 2) * (1 - m):.6g}")

    here = (momenta.index(momentum), 0)
    value(here)
    while not fixed:
        row, half = here
        beside = [(row, half + 2), (row, half - 2), (row - 1, half), (row + 1, half)]
        beside = [point for point in beside if 0 <= point[0] < len(momenta)]
        # The first that is better is taken at once: a valley is walked down, not surveyed.
        better = next((point for point in beside if value(point) < value(here)), None)
        if better is None:
            for beside_lr in (half + 1, half - 1):
                value((row, beside_lr))
            break
        here = better
    ranking = sorted((point for point in found if math.isfinite(found[point])), key=value)
    if not ranking:
        raise RuntimeError(f"diverged at the start, momentum and lr {place(here)}, and beside it")
    return [place(point) for point in ranking[:FINALISTS]]
