"""Gradients by distribution: windows at random places of a large pool.

A few buffers that take turns would give each element the same few values for ever: memory then
grows with the number of rounds, not with its square root, and the threshold runs away from the
guess. Windows make every gradient a fresh one at no cost; consecutive
ones do not overlap, so that no gradient is in the cache when its turn comes.
"""

import math

import torch

CPU_CACHE_BYTES = 512 * 2**20  # twice the largest last-level caches in use
SPAN = 1.5  # drift: the scale swings between e**-1.5 and e**1.5, a factor of 20
ALIGNED = 8  # elements: a window starts at a multiple of 16 bytes


class Gradients:
    """Each call of fresh() gives a gradient, a view of the pool.

    The pool has `parts` times numel elements; a window lies within two of them.
    """

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        data: str,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        cache = 0 if device.type == "cuda" else CPU_CACHE_BYTES  # timing flushes a GPU's cache
        self.numel = numel
        self.parts = min(32, max(4, math.ceil(cache / (numel * dtype.itemsize))))
        self.pool = torch.empty(self.parts * numel, dtype=dtype, device=device)
        for i, part in enumerate(self.pool.split(numel)):
            values = _draw(numel, data, device, generator)
            if data == "drift":
                values.mul_(math.exp(SPAN * math.sin(2 * math.pi * i / self.parts)))
            part.copy_(values)
        self.places = torch.Generator().manual_seed(0)
        self.calls = 0

    def fresh(self) -> torch.Tensor:
        """The next one; it shares no element with the one before."""
        pair = self.calls % (self.parts // 2)
        self.calls += 1
        offset = int(torch.randint(self.numel, (), generator=self.places))
        start = (2 * pair * self.numel + offset) // ALIGNED * ALIGNED
        return self.pool[start : start + self.numel]


def _draw(numel: int, data: str, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(
            low, high, (numel,), dtype=torch.int8, device=device, generator=generator
        )

    if data == "zero":
        return torch.zeros(numel, device=device)
    if data == "ties":
        return integers(-3, 4).float()
    values = torch.empty(numel, device=device)
    if data == "laplace":
        signs = integers(0, 2).mul_(2).sub_(1)
        return values.exponential_(generator=generator).mul_(signs)
    return values.normal_(generator=generator)
