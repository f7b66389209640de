"""Kernels launched by each stage, counted by torch's profiler on a GPU."""

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # no other place has it
from torch.profiler import ProfilerActivity, profile

from benchmarks.ops.timing import Stage


def count(stages: list[Stage], device: torch.device) -> dict[str, dict[str, int]] | None:
    """By stage, how many kernels and how many fills or copies; None on the CPU."""
    if device.type != "cuda":
        return None
    counts = {}
    for stage in stages:
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
            stage.call(0)
            torch.cuda.synchronize(device)
        names = [e.name for e in recording.events() if e.device_type == DeviceType.CUDA]
        if not names:
            raise RuntimeError(f"it saw nothing of {stage.name}")
        fills = sum(name.startswith(("Memset", "Memcpy")) for name in names)
        if stage.timed:
            counts[stage.name] = {"kernels": len(names) - fills, "fills_and_copies": fills}
    return counts
