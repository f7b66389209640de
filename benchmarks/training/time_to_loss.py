#!/usr/bin/env python3
"""Held-out loss against wall clock over slow links: the demo's text model, four gloo workers.

    sudo make network
    python -m benchmarks.training.time_to_loss --rates 100 10

What a step takes is measured at each rate, as by network.py; what steps are worth does
not depend on the rate, so each method trains once, at the highest one, at its best momentum and
learning rate. Time to a loss is the one times the other. Needs root, as network.py does.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.training import namespaces, training_worker
from benchmarks.training.namespaces import RATES
from benchmarks.training.network import rows
from benchmarks.training.network_models import MODELS
from benchmarks.training.training_worker import BEST
from examples.demo.arguments import positive_float, positive_int
from examples.demo.provenance import provenance

# Clipping a worker's gradient needs it whole before anything is sent, so overlap is not among them.
DEFAULT = ["DDP", "DDP bf16", "PowerSGD rank 4", "eager GMC", "eager DGC", "GMC float4",
           "DGC float4", "GMC two-sided float4", "DGC two-sided float4"]  # fmt: skip


def main() -> None:
    options = parse()
    namespaces.require()
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": "time_to_loss",
        **provenance(torch.device("cpu")),
        "load": {"before": report.load()},
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "workers": options.workers,
        "model": MODELS["text"].facts(),
        "units": {
            "losses": f"nats, held out, after every {training_worker.EVERY} steps from 0 on",
            "seconds": "to the target loss: steps times a step's median; null: not reached",
        },
        "training": [],
        "steps": [],
        "seconds": [],
    }
    path = options.output / f"{report.file_stem('time-to-loss', content)}.json"
    with namespaces.Star(options.workers) as star:
        star.limit(max(RATES))
        for run in star.run(training_worker.__name__, str(options.steps), *options.methods):
            content["training"].append(run)
            report.write_json(path, content)
            print(f"{run['method']:<20} momentum {run['momentum']:g}  lr {run['lr']:g}  loss "
                  f"{run['losses'][-1]:.3f} after {options.steps} steps", flush=True)  # fmt: skip
        for rate in sorted(options.rates, reverse=True):
            star.limit(rate)
            content["steps"] += rows(star, "text", rate, options, content["steps"])
            report.write_json(path, content)
    for row in content["steps"]:
        (run,) = (run for run in content["training"] if run["method"] == row["method"])
        steps = steps_to(options.target, run["losses"])
        content["seconds"].append({
            "method": row["method"], "rate_mbit": row["rate_mbit"], "steps": steps,
            "seconds": None if steps is None else steps * row["step"]["median"],
        })  # fmt: skip
    content["load"]["after"] = report.load()
    report.write_json(path, content)
    show(content)
    print(f"numbers: {path}")
    draw(path.with_suffix(".png"), content)


def steps_to(target: float, losses: list[float]) -> int | None:
    """The first evaluation at or below the target."""
    reached = (place for place, loss in enumerate(losses) if loss <= target)
    place = next(reached, None)
    return None if place is None else place * training_worker.EVERY


def show(content: dict) -> None:
    rates = sorted({row["rate_mbit"] for row in content["seconds"]}, reverse=True)
    table = []
    for run in content["training"]:
        row = [run["method"], f"{run['losses'][-1]:.3f}"]
        for rate in rates:
            (found,) = (s for s in content["seconds"]
                        if (s["method"], s["rate_mbit"]) == (run["method"], rate))  # fmt: skip
            row.append("" if found["seconds"] is None else f"{found['seconds']:.0f}")
        table.append(row)
    report.print_table(
        f"seconds to a held-out loss of {content['options']['target']:g}; {content['workers']} "
        f"workers, {content['model']['parameters'] / 1e6:.2f} M parameters",
        ["method", "last loss", *(RATES[rate] for rate in rates)], table)  # fmt: skip


def draw(path: Path, content: dict) -> None:
    plt = report.pyplot()
    if plt is None:
        return

    rates = sorted({row["rate_mbit"] for row in content["steps"]}, reverse=True)
    figure, panels = plt.subplots(
        1, len(rates), figsize=(3.6 * len(rates), 3.8), sharey=True, squeeze=False
    )
    colours = [f"C{place}" for place in range(10)]
    for rate, axes in zip(rates, panels[0], strict=True):
        for run, colour in zip(content["training"], colours, strict=False):
            (row,) = (row for row in content["steps"]
                      if (row["method"], row["rate_mbit"]) == (run["method"], rate))  # fmt: skip
            each = training_worker.EVERY * row["step"]["median"]
            times = [each * place for place in range(len(run["losses"]))]
            style = "-" if run["method"].startswith(("GMC", "DGC")) else "--"
            axes.plot(times[1:], run["losses"][1:], style, color=colour, label=run["method"])
        axes.axhline(content["options"]["target"], color="black", linewidth=0.6)
        axes.set_xscale("log")
        axes.set(xlabel="seconds (log scale)", title=RATES[rate])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out loss (nats)")
    panels[0][0].legend(fontsize=6, frameon=False)
    figure.suptitle(f"Loss against wall clock: {content['workers']} gloo workers on two cores, "
                    f"{content['model']['parameters'] / 1e6:.2f} M parameters",
                    fontsize=9)  # fmt: skip
    figure.tight_layout()
    report.save_picture(plt, figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--rates", nargs="+", type=int, choices=list(RATES), default=[1000, 100, 10],
        metavar="MBIT", help=f"of {', '.join(map(str, RATES))} (default: 1000 100 10)")  # fmt: skip
    add("--methods", nargs="+", choices=list(BEST), default=DEFAULT, metavar="METHOD",
        help=f"(default: {', '.join(DEFAULT)})")  # fmt: skip
    add("--workers", type=positive_int, default=4, help="(default 4)")
    add("--steps", type=positive_int, default=600, help="of training (default 600)")
    add("--target", type=positive_float, default=1.9, help="nats (default 1.9)")
    add("--seconds", type=positive_float, default=3.0, help="of steps for each method and rate")
    report.add_output(parser)
    options = parser.parse_args()
    if any(name.endswith("overlap") for name in options.methods):
        parser.error("--methods: overlap sends before a gradient can be clipped, as it is here")
    return options


if __name__ == "__main__":
    main()
