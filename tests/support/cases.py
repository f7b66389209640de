"""Inputs that are hard for a selection, and one call of compress_ made of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmc_cuda import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIRES = reference.WIRE_DTYPES


def _spike(n: int) -> Tensor:
    values = torch.zeros(n)
    values[n // 3] = -7.0
    return values


VALUES = {
    "gaussian": torch.randn,
    "laplace": lambda n: torch.randn(n).sign() * torch.empty(n).exponential_(),
    "all equal": lambda n: torch.full((n,), -2.5),
    "all zero": torch.zeros,
    "heavy ties": lambda n: torch.randint(-3, 4, (n,)).float(),
    "denormals": lambda n: torch.randn(n) * 1e-40,
    "60 orders of magnitude": lambda n: torch.randn(n) * 10 ** (torch.rand(n) * 60 - 30),
    "one spike": _spike,
    "near overflow": lambda n: (2 * torch.rand(n) - 1) * 3e38,
}
NUMELS = (1, 2, 7, 33, 2048, 2049, 5000, 65536, 65537, 140_001)


def ks(n: int) -> list[int]:
    """Numbers of entries to select from n: one, all, and two between."""
    return sorted({1, n, -(-n // 100), -(-n // 3)})


@dataclass
class Call:
    """Arguments of one compress_ or accumulate_ call; `copy()` gives each backend its own."""

    memory: Tensor
    grads: list[Tensor | None]
    k: int
    aggregate: Tensor | None  # dense
    momentum_buffer: Tensor | None
    options: dict[str, Any]

    def copy(self) -> Call:
        buffer = self.momentum_buffer
        return Call(
            self.memory.clone(),
            self.grads,
            self.k,
            self.aggregate,
            None if buffer is None else buffer.clone(),
            self.options,
        )

    def run(self, backend: Any, state: Tensor | None = None) -> Tensor:
        """Calls backend.compress_; memory and momentum buffer are updated."""
        aggregate = None if self.aggregate is None else backend.sparsify(self.aggregate)
        return backend.compress_(
            self.memory,
            self.grads,
            self.k,
            aggregate=aggregate,
            momentum_buffer=self.momentum_buffer,
            state=state,
            **self.options,
        )

    def run_on_both(self, state: Tensor | None = None) -> tuple[Call, Tensor]:
        """Calls ops and reference with copies, which must agree; that of ops, and its output."""
        mine, theirs = self.copy(), self.copy()
        payload = mine.run(ops, state)
        mine.assert_same(theirs, payload, theirs.run(reference))
        return mine, payload

    def accumulate(self, backend: Any, rank: int, ranks: int) -> Tensor:
        """Calls backend.accumulate_ with the same rule; memory and momentum buffer are updated."""
        of_the_payload = ("wire_dtype", "tag")
        rule = {name: x for name, x in self.options.items() if name not in of_the_payload}
        return backend.accumulate_(
            self.memory,
            self.grads,
            rank=rank,
            ranks=ranks,
            aggregate=self.aggregate,
            momentum_buffer=self.momentum_buffer,
            **rule,
        )

    def assert_same(self, other: Call, output: Tensor, expected: Tensor) -> None:
        """After one call on either of two backends: what it returned, memory, momentum buffer."""
        assert_same_bytes(output, expected, "output")
        assert_same_bytes(self.memory, other.memory, "memory")
        if self.momentum_buffer is not None:
            assert_same_bytes(self.momentum_buffer, other.momentum_buffer, "momentum_buffer")


def unaligned(values: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements behind an aligned address."""
    room = torch.empty(values.numel() + offset, dtype=values.dtype)
    room[offset:] = values
    return room[offset:]


def sample_call(seed: int, values: str, n: int, k: int) -> Call:
    """A call with everything else drawn at random."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    make = VALUES[values]
    cuts = sorted(draw.sample(range(1, n), min(draw.randint(0, 3), n - 1)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    gradient = make(n)
    if draw.random() < 0.2:
        gradient[draw.randrange(n)] = draw.choice([float("nan"), float("inf"), -float("inf")])
    grads: list[Tensor | None] = [
        unaligned(part.to(draw.choice(DTYPES)), draw.randint(0, 3))
        for part in gradient.split(sizes)
    ]
    if draw.random() < 0.2:
        grads[draw.randrange(len(grads))] = None
    params = [torch.randn(size).to(draw.choice(DTYPES)) for size in sizes]
    options: dict[str, Any] = {
        "params": params,
        "momentum": draw.choice([0.9, torch.tensor(0.5)]),
        "weight_decay": draw.choice([0.0, 0.01]),
        "maximize": draw.random() < 0.3,
        "grad_scale": draw.choice([None, 3.0, torch.tensor(1024.0)]),
        "found_inf": draw.choice([None, None, torch.tensor(0.0), torch.tensor([1.0])]),
        "wire_dtype": draw.choice(WIRES),
    }
    aggregate = momentum_buffer = None
    if draw.random() < 0.4:
        momentum_buffer = torch.randn(n)
        options["nesterov"] = draw.random() < 0.5
    elif draw.random() < 0.8:
        aggregate = torch.randn(n) * (torch.rand(n) < 0.1)
    memory = draw.choice([make, torch.zeros, torch.randn])(n)
    options["memory_decay"] = draw.choice([1.0, 0.95, 0.3, 1e-39, 0.0, 1.02, 2.0])
    options["tag"] = draw.choice(
        [0, reference.CALLED_OFF, reference.TAGS - 1, draw.randrange(2**24)]
    )
    return Call(memory, grads, k, aggregate, momentum_buffer, options)


def payloads_of(ranks, n, k, wire_dtype, seed=0, crowded=False):
    """Gathered payloads whose supports partly agree and whose scales differ.

    Args:
        crowded: the entries of each rank lie in a stretch of its own, so that a wire tile has many
            entries of one rank and few of another.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, generator=generator)
    payloads = []
    for rank in range(ranks):
        gradient = (shared + torch.randn(n, generator=generator)) * 4.0 ** (rank % 5)
        if crowded:
            gradient[rank * n // ranks : (rank + 1) * n // ranks] *= 1000
        payloads.append(ops.compress_(torch.zeros(n), [gradient], k, wire_dtype=wire_dtype))
    return torch.stack(payloads)


# Ranges of a bucket: how many, its elements, a range's, K, and K of the last.
RANGES = [(1, 900, 900, 9, 9), (3, 900, 304, 30, 28), (5, 1000, 208, 208, 168),
          (2, 70_000, 35_000, 300, 300), (3, 200_003, 66_672, 400, 390),
          (30, 4000, 136, 2, 1)]  # fmt: skip


def range_payloads(ranges, numel, width, k, last_k, wire_dtype, seed):
    """Payloads of the ranges of a bucket as ops.merge_ranges takes them."""
    generator = torch.Generator().manual_seed(seed)
    row_nbytes = ops.payload_nbytes(width, k, wire_dtype)
    rows = []
    for j in range(ranges):
        size, its_k = (width, k) if j + 1 < ranges else (numel - j * width, last_k)
        values = torch.randn(size, generator=generator)
        payload = ops.compress_(torch.zeros(size), [values], its_k, wire_dtype=wire_dtype)
        rows.append(torch.nn.functional.pad(payload, (0, row_nbytes - payload.numel())))
    return torch.stack(rows)


def assert_same_bytes(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality, on any device; says how much differs and where first."""
    actual, expected = (t.detach().cpu().contiguous().reshape(-1) for t in (actual, expected))
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    differs = actual.view(torch.uint8) != expected.view(torch.uint8)
    if differs.any():
        i = int(differs.nonzero()[0]) // actual.element_size()
        raise AssertionError(
            f"{what}: {int(differs.sum())} bytes differ, first at element {i}: "
            f"{actual[i].item()!r}, must be {expected[i].item()!r}"
        )
