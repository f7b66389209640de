"""Where compress_ looks before it guesses (csrc/shared/guess.h), so that tests can mislead it."""

import torch

RUN = 16


def places(numel: int, k: int, smallest: int = 2048) -> torch.Tensor:
    """The sample's places in a bucket. smallest: GMC_SMALLEST_SAMPLE."""
    wanted = min(-(-numel // k) * 64, numel // 256, 32768)
    runs = max(wanted, smallest) // RUN
    if runs * RUN >= numel:
        return torch.arange(numel)
    run = torch.arange(runs)
    begin = numel * run // runs
    room = (numel * (run + 1) // runs - begin - RUN).clamp(min=1)
    scattered = (run * 2654435761 & 0xFFFFFFFF) >> 8
    return ((begin + scattered % room)[:, None] + torch.arange(RUN)).flatten()


def misleading(x: torch.Tensor, k: int, factor: float, smallest: int = 2048) -> torch.Tensor:
    """x as it is where the sample looks, and `factor` times x elsewhere."""
    other = x * factor
    at = places(x.numel(), k, smallest)
    other[at] = x[at]
    return other
