#!/usr/bin/env python3
"""Which method makes a training step fastest, by a model of it: workers, link rates, four models.

    python -m benchmarks.training.scaling

Counts in how many set-ups each method wins, as a study of 2022 did (Agarwal et al., "On the Utility
of Gradient Compression in Distributed Training Systems": compression paid in 6 of more than 200),
draws the map, and checks the model against what benchmarks/training/network.py measured.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks import report
from benchmarks.training import measured_steps
from benchmarks.training.step_model import METHODS, MODELS, Machine, Network
from examples.demo.arguments import positive_float
from examples.demo.provenance import provenance

WORKERS = [2**power for power in range(1, 11)]
RATES = {"10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10,
         "25 Gbit/s": 2.5e10, "100 Gbit/s": 1e11, "400 Gbit/s": 4e11}  # fmt: skip
DATA_CENTRE = 1e10
CLEAR = 0.1  # a gain that a user would notice


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    machine = Machine(1e12 * options.tflops, 1e9 * options.memory, 1e-6 * options.latency)
    results = [
        {"model": model.name, "workers": workers, "rate": rate,
         "seconds": {name: method.time(model, machine, Network(workers, bits))
                     for name, method in METHODS.items()}}
        for model, workers, (rate, bits) in product(MODELS, WORKERS, RATES.items())
    ]  # fmt: skip
    content = {
        "benchmark": "scaling",
        **provenance(torch.device("cpu")),
        "assumed": {
            "machine": vars(machine),
            "units": "FLOP/s reached in training, bytes/s of a copy, seconds a message",
            "models": {m.name: {"parameters": m.numel, "flop": m.flop, "batch": m.batch}
                       for m in MODELS},
        },
        "count": count(results),
        "results": results,
    }  # fmt: skip
    path = options.output / f"{report.file_stem('scaling', content)}.json"
    show(content)
    found = newest(options) if options.measured is None else options.measured
    if found is None:
        print(f"not checked: no network-*.json in {options.output}")
    else:
        rows = measured_steps.errors(json.loads(found.read_text()))
        content["check"] = {"measured": found.name, "rows": rows,
                            "median_error": median(row["error"] for row in rows)}  # fmt: skip
        show_check(content["check"])
    report.write_json(path, content)
    print(f"numbers: {path}")
    draw(path.with_suffix(".png"), results)


def count(results: list[dict]) -> dict:
    """Of all set-ups, and of those with the rates of a data centre."""
    fast = [row for row in results if RATES[row["rate"]] >= DATA_CENTRE]
    return {"all": counted(results), "10 Gbit/s and above": counted(fast)}


def counted(results: list[dict]) -> dict:
    fastest = dict.fromkeys(METHODS, 0)
    clear = 0
    for row in results:
        seconds = row["seconds"]
        fastest[min(seconds, key=seconds.__getitem__)] += 1
        dense = min(time for name, time in seconds.items() if METHODS[name].dense)
        gmc = min(time for name, time in seconds.items() if name.startswith("GMC"))
        clear += gmc < dense * (1 - CLEAR)
    return {"set_ups": len(results), "fastest": fastest, "gmc_clearly_before_dense": clear}


def newest(options: argparse.Namespace) -> Path | None:
    runs = options.output.glob("network-*.json")
    of_four = [p for p in runs if not any(n in p.stem for n in ("-workers-", "-ms-"))]
    found = sorted(of_four, key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def show(content: dict) -> None:
    counts = content["count"]
    rows = [[name, *(str(part["fastest"][name]) for part in counts.values())] for name in METHODS]
    clear = [str(part["gmc_clearly_before_dense"]) for part in counts.values()]
    rows += [["set-ups", *(str(part["set_ups"]) for part in counts.values())],
             [f"GMC {CLEAR:.0%} and more before DDP and DDP bf16", *clear]]  # fmt: skip
    report.print_table("set-ups in which a method is the fastest", ["", *counts], rows)


def show_check(check: dict) -> None:
    rows = [[row["method"], f"{row['rate_mbit']} Mbit/s", f"{row['predicted']:.2f}",
             f"{row['measured']:.2f}", f"{100 * row['error']:.0f} %"]
            for row in check["rows"]]  # fmt: skip
    report.print_table(
        f"times compute alone, predicted and measured ({check['measured']}); error, median "
        f"{100 * check['median_error']:.0f} %",
        ["method", "rate", "predicted", "measured", "error"], rows)  # fmt: skip


# Okabe and Ito's colours, told apart by colour-blind readers. What a method's variants share is
# its colour's family: dense warm, GMC cold.
COLOURS = {"DDP": "#D55E00", "DDP bf16": "#E69F00", "PowerSGD rank 4": "#CC79A7", "GMC": "#0072B2",
           "GMC overlap": "#56B4E9", "GMC float4": "#004D40", "GMC float4 overlap": "#009E73",
           "GMC 0.1 %": "#999999", "GMC two-sided float4": "#8F7A00",
           "GMC two-sided float4 overlap": "#F0E442",
           "GMC two-sided 1/1000": "#C0B000"}  # fmt: skip


def draw(path: Path, results: list[dict]) -> None:
    plt = report.pyplot()
    if plt is None:
        return
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(METHODS)
    figure, panels = plt.subplots(1, len(MODELS), figsize=(12, 3.9), sharey=True)
    used = set()
    for model, axes in zip(MODELS, panels, strict=True):
        rows = [row for row in results if row["model"] == model.name]
        best = {(row["workers"], row["rate"]): min(row["seconds"], key=row["seconds"].get)
                for row in rows}  # fmt: skip
        used |= set(best.values())
        axes.imshow([[names.index(best[workers, rate]) for workers in WORKERS] for rate in RATES],
                    cmap=ListedColormap([COLOURS[name] for name in names]), vmin=-0.5,
                    vmax=len(names) - 0.5, aspect="auto")  # fmt: skip
        for y, rate in enumerate(RATES):
            for x, workers in enumerate(WORKERS):
                (row,) = (r for r in rows if (r["workers"], r["rate"]) == (workers, rate))
                gain = row["seconds"]["DDP"] / min(row["seconds"].values())
                axes.text(x, y, f"{gain:.3g}" if gain < 100 else f"{gain:.0f}", ha="center",
                          va="center", fontsize=5, color="white")  # fmt: skip
        axes.set_xticks(range(len(WORKERS)), WORKERS, fontsize=6)
        axes.set_yticks(range(len(RATES)), list(RATES), fontsize=7)
        axes.set_xlabel("workers", fontsize=8)
        axes.set_title(f"{model.name}, {model.batch}", fontsize=8)
    handles = [Patch(color=COLOURS[name], label=name) for name in names if name in used]
    figure.legend(handles=handles, loc="lower center", ncols=len(used), fontsize=7, frameon=False)
    figure.suptitle("Fastest step by the model; in each field how many times faster than DDP",
                    fontsize=9)  # fmt: skip
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    report.save_picture(plt, figure, path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--tflops", type=positive_float, default=125, help="reached by a worker (default 125: "
        "40 percent of an A100's bfloat16 peak)")  # fmt: skip
    add("--memory", type=positive_float, default=1700, metavar="GB/S",
        help="bandwidth of a copy on a worker's GPU (default 1700)")  # fmt: skip
    add("--latency", type=positive_float, default=20, metavar="US",
        help="of a message (default 20 microseconds)")  # fmt: skip
    add("--measured", type=Path, metavar="FILE",
        help="network-*.json to check against (default: the newest in --output)")  # fmt: skip
    report.add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
