"""The device of a worker: a GPU for each, or the CPU for all."""

import torch

import gmc_cuda


def check(wanted: str, workers: int) -> None:
    """ValueError if "cuda" is wanted and this machine has fewer GPUs than `workers`."""
    gpus = _gpus()
    if wanted != "cuda" or gpus >= workers:
        return
    raise ValueError(
        f"--device cuda needs a GPU per worker: {workers} workers, {gpus} GPUs on this "
        f"machine; use --workers {gpus} or --device cpu"
        if gpus
        else "--device cuda: torch finds no GPU on this machine; use --device cpu"
    )


def pick(wanted: str, local_rank: int, workers: int) -> torch.device:
    """The device of the worker `local_rank` of `workers` on this machine.

    "auto" is CUDA if there is a GPU for each worker and gmc_cuda has kernels for it.
    """
    check(wanted, workers)
    if wanted == "cpu" or (wanted == "auto" and (_gpus() < workers or not _has_kernels())):
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_kernels() -> bool:
    try:
        ones = torch.ones(1, device="cuda")
        gmc_cuda.ops.compress_(torch.zeros_like(ones), [ones], 1)
    except NotImplementedError:
        return False
    return True
