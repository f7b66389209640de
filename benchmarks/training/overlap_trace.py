#!/usr/bin/env python3
"""A picture of overlap=True: what one of two gloo workers does in a few steps, from the profiler.

    python -m benchmarks.training.overlap_trace

Writes a JSON file and a picture: forward and backward pass, compression, communication and the end
of the step as lanes over time, and which share of the communication lies under the backward pass.
Communication is from the start of a collective to its end, waiting for the other worker included.
Both workers share this machine; it shows the order of things, not the speed of a network.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile, record_function

import gmc_cuda
from benchmarks import report
from examples.demo.arguments import density, positive_int
from examples.demo.provenance import provenance

WORKERS, WARM_UP = 2, 3
MEASURED = "measured.json"  # from the worker of rank 0 to this process
# Lane -> names of the profiler's events, or their part before the first colon. The first three are
# regions of this file.
LANES = {
    "forward": ("forward",),
    "backward": ("backward",),
    "step()": ("step",),
    "compress": ("gmc_cuda::compress_",),
    "communicate": ("gloo",),
    "merge, apply": ("gmc_cuda::merge", "gmc_cuda::merge_", "gmc_cuda::apply_"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=3, help="in the picture")
    parser.add_argument("--layers", type=positive_int, default=8)
    parser.add_argument("--width", type=positive_int, default=1024)
    parser.add_argument("--batch", type=positive_int, default=256)
    parser.add_argument("--density", type=density, default=0.01)
    report.add_output(parser)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)  # fail now, not at the end
    with tempfile.TemporaryDirectory(prefix="gmc-overlap-") as folder:
        start_processes(work, (options, folder), WORKERS, start_method="forkserver")
        measured = json.loads(Path(folder, MEASURED).read_text())
    write(options, measured["stats"], measured["lanes"])
    return 0


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS
    )
    torch.manual_seed(0)
    layers = [nn.Linear(options.width, options.width) for _ in range(options.layers)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    optimizer = gmc_cuda.GMC(
        model.parameters(),
        lr=0.1,
        density=options.density,
        overlap=True,
        bucket_cap_mb=(options.width**2 + options.width) * 4 / 2**20,  # a bucket for each layer
    )
    torch.manual_seed(rank)
    x = torch.randn(options.batch, options.width)
    for _ in range(WARM_UP):
        step(model, optimizer, x)
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.steps):
            step(model, optimizer, x)
    if rank == 0:
        found = {"stats": optimizer.stats(), "lanes": lanes(profiler.events())}
        Path(folder, MEASURED).write_text(json.dumps(found))
    dist.destroy_process_group()


def step(model: nn.Module, optimizer: gmc_cuda.GMC, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    with record_function("forward"):
        loss = model(x).square().mean()
    with record_function("backward"):
        loss.backward()
    with record_function("step"):
        optimizer.step()


def lanes(events: Iterable[Any]) -> dict[str, list[list[float]]]:
    """Lane -> [start, end] of its events in ms, from the first of all."""
    times = {
        lane: sorted(
            [event.time_range.start / 1e3, event.time_range.end / 1e3]
            for event in events
            if event.name in names or event.name.partition(":")[0] in names
        )
        for lane, names in LANES.items()
    }
    first = min(start for spans in times.values() for start, _ in spans)
    return {
        lane: [[round(start - first, 3), round(end - first, 3)] for start, end in spans]
        for lane, spans in times.items()
    }


def share_under(spans: list[list[float]], cover: list[list[float]]) -> float:
    """The share of the spans' time that lies in one of the covers, which are apart."""
    total = sum(end - start for start, end in spans)
    under = sum(
        max(0.0, min(end, until) - max(start, since))
        for start, end in spans
        for since, until in cover
    )
    return under / total


def write(options: argparse.Namespace, stats: dict, spans: dict) -> None:
    facts = provenance(torch.device("cpu"))
    share = share_under(spans["communicate"], spans["backward"])
    path = options.output / (report.file_stem("overlap", facts) + ".json")
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    content = {"benchmark": "overlap_trace", **facts, "workers": WORKERS, "options": asked}
    content |= {
        "bytes_per_step": stats["bytes_per_step"],
        "share_of_communication_under_backward": round(share, 4),
        "units": "ms since the first event",
        "lanes": spans,
    }
    report.write_json(path, content)
    print(f"{100 * share:.0f} % of the communication lies under the backward pass\nnumbers: {path}")
    draw(path.with_suffix(".png"), spans, f"overlap=True: {share:.0%} of the communication under "
         f"the backward pass\n{facts['hardware']['processor']}, {WORKERS} gloo workers, "
         f"{options.layers} layers of width {options.width}")  # fmt: skip


def draw(path: Path, spans: dict, title: str) -> None:
    plt = report.pyplot()
    if plt is None:
        return
    # Okabe and Ito's colours, told apart by colour-blind readers.
    colours = ["#56B4E9", "#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7"]
    figure, axes = plt.subplots(figsize=(9, 3.2))
    for row, (lane, colour) in enumerate(zip(spans, colours, strict=True)):
        bars = [(start, end - start) for start, end in spans[lane]]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, linewidth=0.5)
    axes.set_yticks(range(len(spans)), list(spans))
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    report.save_picture(plt, figure, path)


if __name__ == "__main__":
    sys.exit(main())
