"""The picture: held-out loss against steps, and against bytes sent."""

import argparse
import math
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.demo.methods import LABELS
from examples.demo.task import Task

# Okabe and Ito's colours, told apart by colour-blind readers; dashes for curves that coincide.
STYLES = {
    "dmsgd": {"color": "#000000", "linestyle": "-"},
    "gmc": {"color": "#D55E00", "linestyle": "-"},
    "dgc": {"color": "#0072B2", "linestyle": "--"},
    "memsgd": {"color": "#009E73", "linestyle": "-."},
}


def save(path: Path, task: Task, options: argparse.Namespace, results: dict) -> None:
    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    lowest, highest = math.inf, 0.0  # after the first tenth: before it all methods fall alike
    for method, runs in results.items():
        curves = [run.curve for run in runs]
        steps = [point.step for point in curves[0]]
        megabytes = [point.bytes_sent / 1e6 for point in curves[0]]
        losses = list(zip(*([point.loss for point in curve] for curve in curves)))
        middle = [mean(values) for values in losses]
        low, high = [min(v) for v in losses], [max(v) for v in losses]
        later = [i for i, step in enumerate(steps) if step >= options.steps / 10]
        lowest, highest = min(lowest, *low), max(highest, *(high[i] for i in later))
        style = {**STYLES[method], "label": LABELS[method], "linewidth": 1.8}
        # Nothing was sent before step 1, and a log axis has no place for zero.
        for axes, x, first in ((by_step, steps, 0), (by_bytes, megabytes, 1)):
            axes.plot(x[first:], middle[first:], **style)
            if len(runs) > 1:
                axes.fill_between(x[first:], low[first:], high[first:], alpha=0.15, linewidth=0,
                                  color=style["color"])  # fmt: skip
    if options.task == "digits":
        by_step.set_yscale("log")  # its loss falls by a factor of 30
        by_step.yaxis.set_major_formatter("{x:g}")
    if math.isfinite(lowest) and math.isfinite(highest):
        by_step.set_ylim(0.95 * lowest, 1.02 * highest)
    by_bytes.set_xscale("log")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_step.set(xlabel="steps", ylabel="held-out loss (nats)", title="per step")
    by_bytes.set(xlabel="MB that a worker sends to the others (log scale)", title="per byte sent")
    by_step.legend(frameon=False)
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = f", {options.seeds} seeds (band: lowest to highest)" if options.seeds > 1 else ""
    sent = f"density {options.density}"
    if options.density is None:
        sent = f"sparse methods: 1/{options.bytes_ratio:g} of the bytes on a link"
    split = ", non-iid" if options.non_iid else ""
    figure.suptitle(
        f"{task.title}\n{options.workers} workers{split}, {sent}{seeds}",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
