#!/usr/bin/env python3
"""Time that the host spends on a step of many small tensors, next to torch's fused SGD.

    python -m benchmarks.ops.host                161 tensors of 64 elements, as ResNet-50 has

On the CPU tensors this small leave the kernels little to do; on a GPU the host gets ahead of it and
only its own time is taken. Steps of both are taken by turns; the ratio is within pairs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import gmc_cuda
from benchmarks import report
from examples.demo.provenance import provenance

GOAL = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tensors", type=int, default=161)
    parser.add_argument("--numel", type=int, default=64, help="of one tensor")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks/results", metavar="FOLDER")
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    torch.set_num_threads(1)  # threads that wait for each other are not the host's work

    optimizers = {
        "gmc_cuda.GMC": gmc_cuda.GMC(parameters(options, device), lr=1e-4, momentum=0.9),
        "fused SGD": torch.optim.SGD(
            parameters(options, device), lr=1e-4, momentum=0.9, fused=True
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for step in range(options.steps):
        for name, optimizer in optimizers.items():
            if device.type == "cuda":
                torch.cuda.synchronize()  # the queue is empty, so that no launch has to wait
            began = time.perf_counter()
            optimizer.step()
            if step >= options.steps // 4:
                times[name].append(time.perf_counter() - began)
    ours, theirs = times.values()
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    facts = provenance(device)
    content = {
        "benchmark": "host",
        **facts,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "units": {"seconds": "median, one step on the host", "ratio": "median within pairs"},
        "seconds": medians,
        "ratio": ratio,
        "goal": GOAL,
    }
    path = Path(options.output, report.file_stem("host", facts)).with_suffix(".json")
    report.write_json(path, content)
    for name, median in medians.items():
        print(f"{name:<14} {1e6 * median:6.0f} us")
    outcome = "met" if ratio <= GOAL else "missed"
    print(f"ratio {ratio:.2f}, goal {GOAL} or less: {outcome}\nnumbers: {path}")
    return 0


def parameters(options: argparse.Namespace, device: torch.device) -> list[torch.nn.Parameter]:
    params = [
        torch.nn.Parameter(torch.randn(options.numel, device=device))
        for _ in range(options.tensors)
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


if __name__ == "__main__":
    sys.exit(main())
