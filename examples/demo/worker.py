"""One worker: joins the group, picks its device, trains every method; rank 0 reports."""

import argparse
import json
import os
import re
import signal
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path

from examples.demo import NAME
from examples.demo.supervisor import FOLDER


def run(options: argparse.Namespace) -> int:
    """Exit status. Errors are told in one line, here or by the supervisor."""
    if FOLDER in os.environ:
        threading.Thread(target=_end_with_supervisor, daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun tells; no traceback per worker
    try:
        _work(options)
    except Exception as error:
        _tell_error(error)
        # Not through the interpreter's shutdown: it may wait for peers that are gone.
        sys.stdout.flush()
        os._exit(1)
    return 0


def _work(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    from examples.demo import digits, methods, text, training
    from examples.demo.progress import Progress

    device = pick_device(options.device)
    folder = os.environ.get(FOLDER)
    if folder and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no firewall, no DNS
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store" if folder else "env://",
        rank=int(os.environ["RANK"]),
        world_size=options.workers,
        timeout=timedelta(minutes=10),
        device_id=device if device.type == "cuda" else None,
    )
    rank = dist.get_rank()
    load = {"text": text.load, "digits": digits.load}[options.task]
    task = load(rank, options.workers, options.non_iid).to(device)
    if rank == 0:
        from examples.demo import figure, report

        Path(options.output).mkdir(parents=True, exist_ok=True)  # fail now, not after training
        report.print_start(task, options, device)
    results = {}
    for method in options.methods:
        progress = Progress(methods.LABELS[method], options.steps * options.seeds, rank == 0)
        results[method] = [
            training.train(method, task, options, seed, device, progress)
            for seed in range(options.seeds)
        ]
        progress.close()
    if rank == 0:
        path = Path(options.output, options.task + ("-non-iid" if options.non_iid else ""))
        report.write_json(path.with_suffix(".json"), task, options, device, results)
        figure.save(path.with_suffix(".png"), task, options, results)
        report.print_end(task, options, results)
        print(f"picture: {path.with_suffix('.png')}\nnumbers: {path.with_suffix('.json')}")
    dist.barrier()
    dist.destroy_process_group()


def pick_device(wanted: str):
    """The torch.device of this worker."""
    import torch

    local_rank = int(os.environ["LOCAL_RANK"])
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and (gpus < workers or not _has_kernels())):
        return torch.device("cpu")
    if gpus < workers:
        raise ValueError(
            f"--device cuda needs a GPU per worker: {workers} workers, {gpus} GPUs on this "
            f"machine; use --workers {max(gpus, 1)} or --device cpu"
            if gpus
            else "--device cuda: torch finds no GPU on this machine; use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _has_kernels() -> bool:
    """Whether this build of gmc_cuda runs on CUDA tensors."""
    import torch

    import gmc_cuda

    try:
        ones = torch.ones(1, device="cuda")
        gmc_cuda.ops.compress_(torch.zeros_like(ones), [ones], 1)
    except NotImplementedError:
        return False
    return True


def _end_with_supervisor() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # standard input closed: the supervisor is gone, even if killed


def _tell_error(error: Exception) -> None:
    rank = os.environ["RANK"]
    message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lost = bool(re.search(r"connection (closed|reset)|broken pipe", str(error), re.IGNORECASE))
    if FOLDER in os.environ:
        expected = isinstance(error, (ValueError, OSError, ImportError, NotImplementedError))
        record = {
            "message": message,
            "lost_connection": lost,
            "traceback": "" if expected else traceback.format_exc(),
        }
        path = Path(os.environ[FOLDER], f"error-{rank}.json")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.rename(path)
    else:
        told = "lost the connection to another worker" if lost else message
        print(f"{NAME}: worker {rank}: {told}", file=sys.stderr, flush=True)
