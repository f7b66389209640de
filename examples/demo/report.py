"""The lines before training, the table after it, and the JSON file."""

import argparse
import json
import math
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.demo.methods import LABELS
from examples.demo.provenance import provenance
from examples.demo.task import Task
from examples.demo.training import Run

Results = dict[str, list[Run]]


def print_start(task: Task, options: argparse.Namespace, device: torch.device) -> None:
    runs = "one run" if options.seeds == 1 else f"{options.seeds} seeds"
    where = "NCCL on CUDA" if device.type == "cuda" else "gloo on the CPU"
    parameters = sum(p.numel() for p in task.make_model().parameters())
    wire = options.wire_dtype.split("_")[0]
    sent = f"density {options.density}, {wire} values"
    if options.density is None:
        sent = f"1/{options.bytes_ratio:g} of the bytes on a link, {wire} values"
    print(
        f"{task.title}\n"
        f"  data     {task.data}\n"
        f"  model    {parameters:,} parameters\n"
        f"  workers  {options.workers}, {where}, {options.batch} examples per worker and step\n"
        f"  runs     {options.steps} steps, {runs} per method; sparse methods: {sent}",
        flush=True,
    )


def print_end(task: Task, options: argparse.Namespace, results: Results) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True, vertical="bottom")
    for heading in ("momen-\ntum", "lr", "loss", "accuracy\n%", "MB a\nworker\nsends",
                    "less\nthan\ndense", "ms\nper\nstep"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for method, runs in results.items():
        table.add_row(
            LABELS[method],
            f"{options.tuned[method]['momentum']:g}",
            f"{options.tuned[method]['lr']:g}",
            _spread([run.loss for run in runs], 3),
            _spread([100 * run.accuracy for run in runs], 1),
            f"{mean(run.bytes_per_step for run in runs) / 1e6:.3g}",
            f"{_reduction(runs):.3g}x",
            f"{1e3 * mean(run.seconds_per_step for run in runs):.0f}",
        )
    console = Console(width=80, highlight=False)
    console.print()
    console.print(table)
    console.print()
    start = mean(run.curve[0].loss for runs in results.values() for run in runs)
    print(
        f"Loss and accuracy ({task.unit}) are on held-out data; the loss was {start:.2f} before\n"
        "training. MB is what a worker sends to the others in a step, for dense gradients by a\n"
        "ring all-reduce."
    )
    if options.lr is None and options.momentum is None:
        other = " (memory\nSGD's for the all-gather)" if options.task == "digits" else ""
        print(
            "Momentum and lr are each method's best, found by benchmarks/training/convergence.py\n"
            "for the default number of steps, 4 workers and 1/100 of the bytes on a link"
            f"{other}."
        )
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == options.workers:
        print(
            f"Time: {options.workers} workers share one machine ({_cores()}) with no network "
            "between them; it says\nnothing about slow networks, which is where sending less pays."
        )
    if options.seeds > 1:
        print(f"Values are means over {options.seeds} seeds, ± their standard deviation.")
    for line in _remarks(results):
        print(line)


def write_json(
    path: Path, task: Task, options: argparse.Namespace, device: torch.device, results: Results
) -> None:
    """Everything measured, with where and how; NaN is written as null."""
    chosen = {
        name: value for name, value in vars(options).items() if name not in ("output", "tuned")
    }
    content = {
        "benchmark": "train",
        **provenance(device),
        "options": {**chosen, "device": device.type},
        "task": {"title": task.title, "data": task.data, "accuracy_counts": task.unit},
        "units": {
            "bytes": "sent by one worker to the others",
            "loss": "cross-entropy in nats on held-out data",
            "accuracy": "0 to 1, on held-out data",
        },
        "results": {
            method: {
                "label": LABELS[method],
                **options.tuned[method],
                "reduction": _reduction(runs),
                "runs": [run.to_json() for run in runs],
            }
            for method, runs in results.items()
        },
    }
    path.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def _remarks(results: Results) -> list[str]:
    """What a reader of the table must know besides: divergence, skipped steps, spread of dense."""
    lines = []
    for method, runs in results.items():
        if not all(math.isfinite(run.loss) for run in runs):
            lines.append(f"{LABELS[method]} diverged: try a lower --lr.")
        if skipped := sum(run.skipped_steps for run in runs):
            lines.append(f"{LABELS[method]}: {skipped} steps skipped for a non-finite gradient.")
    dense = [100 * run.accuracy for run in results.get("dmsgd", [])]
    if len(dense) > 1 and len(results) > 1:
        gaps = [
            f"{LABELS[method]} {mean(100 * run.accuracy for run in runs) - mean(dense):+.2f}"
            for method, runs in results.items()
            if method != "dmsgd"
        ]
        lines.append(
            f"Mean accuracy in points from dense: {', '.join(gaps)};\n"
            f"between its seeds, dense itself varies by {max(dense) - min(dense):.2f}."
        )
    return lines


def _reduction(runs: list[Run]) -> float:
    return mean(run.dense_bytes_per_step for run in runs) / mean(r.bytes_per_step for r in runs)


def _spread(values: list[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def _cores() -> str:
    count = len(os.sched_getaffinity(0))
    return "1 core" if count == 1 else f"{count} cores"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
