#!/usr/bin/env python3
"""Training steps over slow links: four gloo workers in network namespaces, each at most at a rate.

    sudo make network                    python benchmarks/network.py --rates 100 --methods GMC DDP

Next to GMC: DistributedDataParallel, its bfloat16 and PowerSGD hooks, and GMC and DGC written in
eager PyTorch. Around each, compute alone: the same workers, each with fused SGD for itself. Needs
root, for the namespaces, which are deleted at the end, also after Ctrl-C.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from bench import namespaces, network_methods, network_worker, report
from bench.network_methods import METHODS
from compare_methods.arguments import positive_float, positive_int
from compare_methods.provenance import provenance

RATES = {10_000: "10 Gbit/s", 1_000: "1 Gbit/s", 100: "100 Mbit/s", 10: "10 Mbit/s"}
PORT = 29500


def main() -> int:
    options = parse()
    problem = namespaces.missing()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is here is deleted
    model = network_worker.make_model()
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    content = {
        "benchmark": "network",
        **provenance(torch.device("cpu")),
        "load": {"before": report.load()},
        "options": asked,
        "workers": options.workers,
        "model": {
            "parameters": sum(param.numel() for param in model.parameters()),
            "tensors": len(list(model.parameters())),
            "batch": network_worker.BATCH,
        },
        "units": {
            "step, compute_alone": "seconds, means over the workers",
            "times_compute_alone": "ratios within a round",
            "link_bytes": "sent by a worker's interface in a step",
            "payload_bytes": "handed to a collective by a worker in a step",
        },
        "results": [],
    }
    path = options.output / f"{report.file_stem('network', content)}.json"
    with namespaces.Star(options.workers) as star:
        for rate in sorted(options.rates, reverse=True):
            star.limit(rate)
            slow = rate < 100
            asked = [m for m in options.methods if not (slow and m in network_methods.DENSE)]
            for found in measured(star, options.seconds, asked):
                add(content, {**found, "rate_mbit": rate, "estimated": False}, path)
            for method in [m for m in options.methods if m not in asked]:
                add(content, estimate(content, method, rate), path)
    show(content)
    print(f"numbers: {path}")
    return 0


def measured(star: namespaces.Star, seconds: float, methods: list[str]):
    """Runs the workers, and yields what rank 0 found of each method."""
    root = Path(__file__).parent
    variables = {
        **os.environ,
        "MASTER_ADDR": star.address(0), "MASTER_PORT": str(PORT),
        "WORLD_SIZE": str(len(star.workers)), "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses here have no names, which is warned of
        "PYTHONPATH": os.pathsep.join([str(root), str(root.parent / "examples"), str(root.parent)]),
    }  # fmt: skip
    script = [sys.executable, network_worker.__file__, str(seconds), *methods]
    workers = [
        subprocess.Popen(star.command(rank, script), env={**variables, "RANK": str(rank)},
                         stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True)
        for rank in range(len(star.workers))
    ]  # fmt: skip
    try:
        for line in workers[0].stdout:
            yield json.loads(line)
        codes = [worker.wait(60) for worker in workers]
        if any(codes):
            raise RuntimeError(f"workers ended with exit statuses {codes}; see above")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def estimate(content: dict, method: str, rate: int) -> dict:
    """From the bytes seen at a higher rate, at full use of the link, nothing overlapped."""
    seen = [row for row in content["results"] if row["method"] == method and not row["estimated"]]
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
    print(f"{RATES[row['rate_mbit']]:<10}  {row['method']:<18}  {1e3 * step:8.0f} ms  "
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
        help=f"of {', '.join(map(repr, METHODS))} (default: all)")  # fmt: skip
    add("--workers", type=positive_int, default=4, help="(default 4)")
    add("--seconds", type=positive_float, default=10.0, help="for each method (default 10)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
