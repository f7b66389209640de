"""What is measured: one factor is varied at a time around a centre."""

import argparse
import itertools
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.ops.options import FACTORS
from gmc_cuda import ops
from gmc_cuda._engine import budget

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp4": torch.float4_e2m1fn_x2,
}


@dataclass(frozen=True)
class Case:
    numel: int
    density: float
    grad_dtype: str
    wire: str
    ranks: int
    method: str
    data: str
    exchange: str = "all_gather"
    tensors: int = 1
    peers: bool = True  # measured beside it

    @property
    def k(self) -> int:
        return budget.entries_at(self.density, self.numel)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.grad_dtype]

    @property
    def wire_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.wire]

    @property
    def payload_nbytes(self) -> int:
        return ops.payload_nbytes(self.numel, self.k, self.wire_dtype)

    def to_json(self) -> dict:
        fields = asdict(self)
        del fields["peers"]
        return {**fields, "k": self.k}


def choose(options: argparse.Namespace, numels: list[int]) -> list[Case]:
    """All cases of a run: the centre at every size, then the variations."""
    factors = {name: getattr(options, name) for name in FACTORS}
    numels = sorted(numels)
    if options.cross:
        return [
            Case(numel, **dict(zip(factors, values)), tensors=options.tensors)
            for numel in numels
            for values in itertools.product(*factors.values())
        ]
    first = {name: values[0] for name, values in factors.items()}
    centres = [Case(numel, **first, tensors=options.tensors) for numel in numels]
    # A peer's time does not depend on the ranks or on our wire type, and hardly on the data. None
    # sends two-sided.
    without_peers = set(factors) if options.quick else {"wire", "ranks", "exchange", "data"}
    middle = numels[(len(numels) - 1) // 2]
    return centres + [
        replace(centre, **{name: value}, peers=name not in without_peers)
        for centre in centres
        if centre.numel == middle or not options.quick
        for name, values in factors.items()
        for value in values[1:]
    ]
