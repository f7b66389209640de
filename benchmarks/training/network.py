#!/usr/bin/env python3
"""Training steps over slow links: gloo workers in network namespaces, each at most at a rate.

    sudo make network
    python -m benchmarks.training.network --rates 100 --methods GMC DDP

Next to GMC: LocalUpdates, DistributedDataParallel, its bfloat16 and PowerSGD hooks, GMC and DGC in
eager PyTorch. In each round also compute alone: the same workers, each with fused SGD alone. Needs
root, for the namespaces, which are deleted at the end, also after Ctrl-C. A run that was cut short
goes on if it is started again on the same day.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.training import namespaces, network_worker
from benchmarks.training.namespaces import RATES
from benchmarks.training.network_methods import DENSE, METHODS
from benchmarks.training.network_models import MODELS
from examples.demo.arguments import non_negative_float, positive_float, positive_int
from examples.demo.provenance import provenance


def main() -> None:
    options = parse()
    namespaces.require()
    options.output.mkdir(parents=True, exist_ok=True)
    model = MODELS[options.model]
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    content = {
        "benchmark": "network",
        **provenance(torch.device("cpu")),
        "load": {"before": report.load()},
        "options": asked,
        "workers": options.workers,
        "model": model.facts(),
        "units": {
            "step, compute_alone": "seconds, means over the workers",
            "times_compute_alone": "ratios within a round",
            "link_bytes": "sent by a worker's interface in a step",
            "payload_bytes": "handed to a collective by a worker in a step",
        },
        "complete": False,
        "results": [],
    }
    name = "network" if options.model == "large" else f"network-{options.model}"
    if options.workers != 4:
        name += f"-{options.workers}-workers"
    if options.latency is not None:
        name += f"-{options.latency:g}-ms"
    path = options.output / f"{report.file_stem(name, content)}.json"
    before = report.earlier(path, content, "model")
    content["results"] = [] if before.get("complete") else before.get("results", [])
    with namespaces.Star(options.workers) as star:
        if options.latency:
            star.delay(options.latency)
        for rate in sorted(options.rates, reverse=True):
            star.limit(rate)
            for row in rows(star, options.model, rate, options, content["results"]):
                add(content, row, path)
    report.write_json(path, content | {"complete": True})
    show(content)
    print(f"numbers: {path}")


def rows(
    star: namespaces.Star, model: str, rate: int, options: argparse.Namespace, before: list[dict]
) -> Iterator[dict]:
    """Each method at the rate that the links have; before: rows that are there already."""
    done = {row["method"] for row in before if row["rate_mbit"] == rate}
    missing = [name for name in options.methods if name not in done]
    asked = [name for name in missing if rate >= 100 or name not in DENSE]
    if asked:
        for found in star.run(network_worker.__name__, model, str(options.seconds), *asked):
            yield {**found, "rate_mbit": rate, "estimated": False}
    for name in missing:
        if name not in asked:
            yield estimate(before, name, rate)


def estimate(before: list[dict], method: str, rate: int) -> dict:
    """From the bytes seen at a higher rate, at full use of the link, nothing overlapped."""
    seen = [row for row in before if row["method"] == method and not row["estimated"]]
    if not seen:
        raise SystemExit(f"{method} at {RATES[rate]} is estimated from a higher rate: add --rates")
    row = seen[-1]
    alone = row["compute_alone"]
    step = alone + 8 * row["link_bytes"] / (1e6 * rate)
    ratio = {"median": step / alone}
    step = {"median": step}
    return {**row, "rate_mbit": rate, "step": step, "times_compute_alone": ratio, "rounds": 0,
            "estimated": True}  # fmt: skip


def add(content: dict, row: dict, path: Path) -> None:
    content["results"].append(row)
    content["load"]["after"] = report.load()
    report.write_json(path, content)
    step, ratio = row["step"]["median"], row["times_compute_alone"]
    spread = " to ".join(f"{value:.2f}" for value in ratio.get("quartiles", []))
    print(f"{RATES[row['rate_mbit']]:<10}  {row['method']:<28}  {1e3 * step:8.0f} ms  "
          f"{ratio['median']:6.2f} x compute alone {f'({spread})' if spread else '':<14}  "
          f"{row['link_bytes'] / 1e6:8.3f} MB{'  estimated' * row['estimated']}",
          flush=True)  # fmt: skip


def show(content: dict) -> None:
    rates = sorted({row["rate_mbit"] for row in content["results"]}, reverse=True)
    rows = []
    for method in dict.fromkeys(row["method"] for row in content["results"]):
        cells = {row["rate_mbit"]: row for row in content["results"] if row["method"] == method}
        rows.append([method, *(cell(cells.get(rate)) for rate in rates)])
    report.print_table(
        f"ms a step, and times compute alone; {content['workers']} workers, "
        f"{content['model']['parameters'] / 1e6:.1f} M parameters; * estimated from bytes",
        ["method", *(RATES[rate] for rate in rates)], rows)  # fmt: skip


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    step = row["step"]["median"]
    ratio = row["times_compute_alone"]["median"]
    return f"{1e3 * step:.0f}{'*' * row['estimated']} ({ratio:.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--rates", nargs="+", type=int, choices=list(RATES), default=list(RATES), metavar="MBIT",
        help=f"of {', '.join(map(str, RATES))} Mbit/s (default: all)")  # fmt: skip
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help=f"of {', '.join(map(repr, METHODS)).replace('%', '%%')} (default: all)")  # fmt: skip
    add("--model", choices=list(MODELS), default="large",
        help="large: 10.9 M parameters (default); text: the demo's")  # fmt: skip
    add("--workers", type=positive_int, default=4, help="(default 4)")
    add("--latency", type=non_negative_float,
        help="milliseconds that a packet takes between workers, in a file of its own")  # fmt: skip
    add("--seconds", type=positive_float, default=10.0, help="for each method (default 10)")
    report.add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
