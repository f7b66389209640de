#!/usr/bin/env python3
"""Whether `python -m gmc_cuda.advise` is right: what it says of a step, and what steps then take.

    sudo .venv/bin/python -m benchmarks.training.advice
    sudo .venv/bin/python -m benchmarks.training.advice --set-ups 4:1000 8:10

Workers in network namespaces get the advice, then train with each method that it tried and with
DistributedDataParallel. Needs root, as network.py does.
"""

import argparse
import json
import sys
from statistics import median

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.training import namespaces
from benchmarks.training.namespaces import RATES
from benchmarks.training.network_methods import METHODS, ComputeAlone, ours
from benchmarks.training.network_models import MODELS
from benchmarks.training.network_worker import LR, MOMENTUM, backward, timed_step
from examples.demo import text
from examples.demo.arguments import positive_float
from examples.demo.provenance import provenance
from gmc_cuda import advise

STEPS = 12
OTHERS = {"compute alone": ComputeAlone, "DDP": METHODS["DDP"]}  # what is not ours


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "worker":
        return worker(float(sys.argv[2]))
    options = parse()
    namespaces.require()
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": "advice",
        **provenance(torch.device("cpu")),
        "load": {"before": report.load()},
        "model": MODELS["large"].facts(),
        "units": {"said, took": "seconds of a step", "error": "said / took - 1"},
        "results": [],
    }
    path = options.output / f"{report.file_stem('advice', content)}.json"
    for workers, rate in options.set_ups:
        with namespaces.Star(workers) as star:
            star.limit(rate)
            for row in star.run("benchmarks.training.advice", "worker", str(options.seconds)):
                content["results"].append({"workers": workers, "rate_mbit": rate, **row})
                content["load"]["after"] = report.load()
                report.write_json(path, content)
    rows = [
        [f"{row['workers']} workers, {RATES[row['rate_mbit']]}",
         row["method"] + " (estimated)" * row["estimated"],
         f"{1e3 * row['said']:.0f}", f"{1e3 * row['took']:.0f}", f"{100 * row['error']:+.0f} %"]
        for row in content["results"]
    ]  # fmt: skip
    headings = ["set-up", "method", "said, ms", "took, ms", "error"]
    report.print_table("a step by the advice, and as it then was", headings, rows)
    print(f"numbers: {path}")
    return None


def worker(seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = MODELS["large"]
    task = text.load(dist.get_rank(), dist.get_world_size(), False)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def batch() -> tuple:
        return task.batch(model.batch, generator)

    for advice in advise.measure(model.make(), lambda module: backward(module, batch()), seconds):
        make = OTHERS.get(advice.method) or ours(**advice.options)
        method = make(model.make(), LR, MOMENTUM)
        # A method whose step takes minutes would take the rest of the day.
        steps = STEPS if advice.seconds * STEPS < seconds else 2
        times = [timed_step(method, batch()) for _ in range(2 + steps if steps == STEPS else steps)]
        took = median(times[-steps:])
        if dist.get_rank() == 0:
            row = {"method": advice.method, "said": advice.seconds, "took": took,
                   "error": advice.seconds / took - 1, "estimated": advice.estimated}  # fmt: skip
            print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def set_up(value: str) -> tuple[int, int]:
    workers, _, rate = value.partition(":")
    if not workers.isdigit() or not rate.isdigit() or int(rate) not in RATES:
        known = ", ".join(map(str, RATES))
        raise argparse.ArgumentTypeError(f"got {value!r}, must be WORKERS:MBIT, MBIT of {known}")
    return int(workers), int(rate)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--set-ups", nargs="+", type=set_up, default=[(4, 1000), (4, 100), (8, 100)],
        metavar="WORKERS:MBIT", help="(default: 4:1000 4:100 8:100)")  # fmt: skip
    add("--seconds", type=positive_float, default=60.0, help="of the advice (default 60)")
    report.add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
