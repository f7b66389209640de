"""Checkpoints that keep every worker's memory, and resume on any number of workers.

A checkpoint is a folder on storage that all workers see. Each save writes a subfolder of its own;
it becomes the current one when every worker's file is there and whole, and only then are older
ones removed. A save that ends half-way (a full disk, a killed worker) leaves what was there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from gmc_cuda._engine import background, engine, meeting, parts, snapshot
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.shards import is_flattened

_NOT_SAVED = "the checkpoint was not saved"
_INTACT = "what the folder held is complete"
_PATIENCE = 3.0  # seconds, in which a network file system shows what another machine has made


@torch.no_grad()
def save(
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: CompressedSGD,
    extra: Any = None,
    *,
    wait: bool = True,
    keep: int = 1,
) -> Future[None]:
    """Saves model, optimizer and what else a run needs. All workers of the optimizer call it.

    Args:
        folder: where the checkpoint goes, on storage that all workers see.
        model: the model, also inside the wrappers of torch. Buffers that differ between workers
            (BatchNorm's) are saved as worker 0 has them.
        optimizer: a GMC or DGC over the model's parameters, which FSDP2 may have sharded.
        extra: worker 0's is saved: a scheduler's state_dict, the epoch; tensors, numbers, strings
            and containers of them.
        wait: False copies the state and writes it while the training goes on, also after the
            process group was destroyed. The next save and the end of the script wait for it.
        keep: how many older checkpoints stay beside the new one.

    Returns:
        A future: ``result()`` waits for the end of the writing, and raises if it failed. A failure
        that nobody reads is a warning at the next save or at the end of the script.

    Raises:
        TypeError: another optimizer, or extra holds what torch.load(weights_only=True) would
            refuse.
        ValueError: no usable folder or keep.
        RuntimeError: a worker could not write, does not see the folder, or did not call save
            within the time-out of the process group; on all workers. The checkpoints before are
            intact.
    """
    _check_optimizer(optimizer)
    saved: Future[None] = Future()
    everyone = _everyone(optimizer)
    background.wait()
    try:
        meeting.meet(everyone, "checkpoint.save")
        writing = _Save(folder, model, optimizer, extra, everyone, wait, keep)
        if not wait:
            return background.run(writing.write)
        writing.write()
    except GroupLost as error:
        raise error.with_context("checkpoint.save", everyone.rank, _INTACT) from error
    saved.set_result(None)
    return saved


@torch.no_grad()
def load(
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: CompressedSGD,
    *,
    name: str | None = None,
) -> Any:
    """Loads what :func:`save` wrote into model and optimizer. All workers call it.

    On as many workers as saved it each gets its own memory back, and the run goes on bit for bit.
    On another number each gets the mean of the saved memories, so that nothing unsent is lost.
    Shards stay what they were: the number of nodes may change, not that of workers in a node.

    Args:
        name: of a subfolder, to load an older checkpoint than the current one.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: there is no complete checkpoint in the folder, on any worker.
        ValueError: it is of another method, model or format; nothing was changed.
        RuntimeError: it is damaged, or a worker cannot read it; on all workers, and nothing was
            changed. The error names the older checkpoints that are there.
    """
    _check_optimizer(optimizer)
    everyone = _everyone(optimizer)
    background.wait()
    try:
        meeting.meet(everyone, "checkpoint.load")
        found = _read(folder, name, model, optimizer, everyone)
    except GroupLost as error:
        raise error.with_context("checkpoint.load", everyone.rank, "nothing was loaded") from error
    optimizer.load_state_dict(found.optimizer)
    model.load_state_dict(found.model)
    return found.extra


class _Save:
    """One checkpoint on its way into its folder. Collective over everyone.

    It is agreed here that all workers see the part of the folder that it goes into.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: torch.nn.Module,
        optimizer: CompressedSGD,
        extra: Any,
        everyone: Exchange,
        wait: bool,
        keep: int,
    ) -> None:
        self._rank, self._keep = everyone.rank, keep
        self._council: meeting.Council = meeting.Collective(everyone, engine.device_of(optimizer))

        def begin() -> str | None:
            background.finish()
            optimizer.engine.refuse_open_round("checkpoint.save")
            if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
                raise ValueError(f"keep: got {keep!r}, must be an integer of at least 0")
            path = parts.folder_of(folder)
            kept = snapshot.loadable("extra", extra)
            self._files = snapshot.take(model, optimizer, kept, everyone, copy=not wait)
            return str(parts.begin(path)) if everyone.rank == 0 else None

        def join() -> None:
            _wait_until_seen(self._part, everyone.rank, there)
            if not wait:
                seconds = meeting.timeout_of(everyone.group)
                notes = self._part / parts.NOTES
                self._council = meeting.Notes(notes, everyone.rank, everyone.size, seconds)

        (there, *_) = _together(everyone, optimizer, begin, _NOT_SAVED)
        self._part = parts.folder_of(folder) / Path(str(there)).name
        try:
            _together(everyone, optimizer, join, _NOT_SAVED)
        except Exception:
            if everyone.rank == 0:
                parts.remove(self._part)
            raise

    def write(self) -> None:
        """Writes, and publishes what all have written."""
        said: meeting.Report = {"files": {}}
        try:
            for name, value in self._files.items():
                said["files"][name] = parts.write(self._part / name, value)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        self._files = {}
        answer = self._council.decide(said, _gather_files)
        if "error" not in answer:
            answer = self._council.decide(self._verify(answer["files"]), self._publish)
        if "error" in answer:
            self._clear()
            raise RuntimeError(f"{_NOT_SAVED}; {answer['error']}; {_INTACT}")

    def _verify(self, files: list[parts.Listing]) -> meeting.Report:
        """Reads what the next worker has written; rank 0 keeps the list."""
        self._listing = {name: entry for listed in files for name, entry in listed.items()}
        try:
            for name, (size, checksum) in files[(self._rank + 1) % len(files)].items():
                parts.verify(self._part, name, size, checksum)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _publish(self, everyone: list[meeting.Report]) -> meeting.Report:
        failed = _failures(everyone)
        if failed:
            return {"error": failed}
        try:
            parts.publish(self._part, self._listing, self._keep)
        except Exception as error:
            return {"error": f"worker 0: {type(error).__name__}: {error}"}
        return {}

    def _clear(self) -> None:
        if self._rank == 0 and isinstance(self._council, meeting.Collective):
            parts.remove(self._part)
        elif self._rank == 0:  # the others may not have read the answer yet; the next save removes
            parts.empty(self._part)


def _gather_files(everyone: list[meeting.Report]) -> meeting.Report:
    failed = _failures(everyone)
    return {"error": failed} if failed else {"files": [said["files"] for said in everyone]}


def _failures(everyone: list[meeting.Report]) -> str:
    failed = [f"worker {r}: {said['error']}" for r, said in enumerate(everyone) if "error" in said]
    return "; ".join(failed)


def _read(
    folder: str | os.PathLike[str],
    name: str | None,
    model: torch.nn.Module,
    optimizer: CompressedSGD,
    everyone: Exchange,
) -> snapshot.Found:
    """Reads on every worker what it needs of the part that worker 0 names."""
    found: list[snapshot.Found] = []

    def find() -> str:
        return parts.find(parts.folder_of(folder), name).name

    def read() -> None:
        part = parts.folder_of(folder) / there
        if there != names[everyone.rank]:  # another view of a network file system, or another disk
            _wait_until_seen(part, everyone.rank, str(part))
        try:
            found.append(snapshot.read(part, model, optimizer))
        except parts.Damaged as error:
            told = f"the checkpoint is damaged: {error}{parts.others(part.parent, part)}"
            raise parts.Damaged(told) from error

    names = _together(everyone, optimizer, find, "the checkpoint was not loaded")
    there = names[0]
    _together(everyone, optimizer, read, "the checkpoint was not loaded")
    return found[0]


def _together(
    everyone: Exchange, optimizer: CompressedSGD, action: Callable[[], Any], outcome: str
) -> list[Any]:
    """What the action returns on each worker. If it fails on one, all raise."""
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as met:
        error = met
    text = error and f"{type(error).__name__}: {error}"
    said = everyone.gather_objects((text, result), engine.device_of(optimizer))
    failed = [(rank, text) for rank, (text, _) in enumerate(said) if text]
    if not failed:
        return [result for _, result in said]
    # That there is no checkpoint makes scripts start anew, so it must be so on all workers.
    nowhere = all(text.startswith(FileNotFoundError.__name__) for _, text in failed)
    if isinstance(error, FileNotFoundError) and nowhere and len(failed) == len(said):
        raise error
    if isinstance(error, (RuntimeError, ValueError, TypeError)):
        raise error
    told = "; ".join(f"worker {rank}: {text}" for rank, text in failed)
    if nowhere:
        told += ". The folder must be on storage that all workers see"
    raise RuntimeError(f"{outcome}; {told}") from error


def _wait_until_seen(part: Path, rank: int, there: Any) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not parts.is_seen(part):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"folder: worker {rank}, on {socket.gethostname()}, does not see {there}, which "
                f"worker 0 has made, in its {part.parent}. It must be one folder on storage that "
                "all workers see. Where there is none, let each worker save and load its own "
                "state:\n"
                "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
            )
        time.sleep(0.05)


def _everyone(optimizer: CompressedSGD) -> Exchange:
    """The workers that save together: those of all shards."""
    exchange = optimizer.engine.exchange
    if exchange.shard_group is None:
        return exchange
    everyone = Exchange(None)
    wanted = exchange.size * snapshot.shards(optimizer)
    if everyone.size != wanted:
        raise ValueError(
            f"optimizer: got a mesh of {wanted} workers, must hold all {everyone.size} of this run"
        )
    return everyone


def _check_optimizer(optimizer: Any) -> None:
    by_itself = (
        "Let each worker save and load its own state:\n"
        "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
    )
    if not isinstance(optimizer, CompressedSGD):
        raise TypeError(
            f"optimizer: got a {type(optimizer).__name__}, must be a GMC or DGC. {by_itself}"
        )
    if any(is_flattened(param) for param in engine.params_of(optimizer)):
        raise TypeError(
            "optimizer: got parameters of FullyShardedDataParallel, whose parts say nothing of the "
            f"whole, must be FSDP2's (fully_shard). {by_itself}"
        )
