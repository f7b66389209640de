"""One worker: joins the group, picks its device, trains every method; rank 0 reports."""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from examples.demo import device, digits, figure, methods, report, text, training
from examples.demo.progress import Progress


def run(options: argparse.Namespace) -> int:
    """The exit status. torchrun tells of an error, once for all workers."""
    try:
        _work(options)
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # another launcher, which tells nothing
            raise
        get_error_handler().record_exception(error)
        # Not through the interpreter's shutdown: it may wait for peers that are gone.
        sys.stdout.flush()
        os._exit(1)
    return 0


def _work(options: argparse.Namespace) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", options.workers))
    place = device.pick(options.device, int(os.environ["LOCAL_RANK"]), here)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=timedelta(minutes=10),
        device_id=place if place.type == "cuda" else None,
    )
    rank = dist.get_rank()
    load = {"text": text.load, "digits": digits.load}[options.task]
    task = load(rank, options.workers, options.non_iid).to(place)
    if rank == 0:
        Path(options.output).mkdir(parents=True, exist_ok=True)  # fail now, not after training
        report.print_start(task, options, place)
    results = {}
    for method in options.methods:
        progress = Progress(methods.LABELS[method], options.steps * options.seeds, rank == 0)
        results[method] = [
            training.train(method, task, options, seed, place, progress)
            for seed in range(options.seeds)
        ]
        progress.close()
    if rank == 0:
        path = Path(options.output, options.task + ("-non-iid" if options.non_iid else ""))
        report.write_json(path.with_suffix(".json"), task, options, place, results)
        figure.save(path.with_suffix(".png"), task, options, results)
        report.print_end(task, options, results)
        print(f"picture: {path.with_suffix('.png')}\nnumbers: {path.with_suffix('.json')}")
    dist.barrier()
    dist.destroy_process_group()
