"""Checkpoints that keep every worker's memory, and resume on any number of workers.

A checkpoint is a folder on storage that all workers see. Each save writes a subfolder of its own,
which becomes the current one once every worker's file is complete; only then are older ones
removed. A save that breaks off (a full disk, a killed worker) leaves the older ones intact.
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
_INTACT = "older checkpoints in the folder are intact"
_PATIENCE = 3.0  # seconds after which a network file system shows what another machine has written


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
    """Saves the model, the optimizer and ``extra``. All workers of the optimizer must call it.

    Args:
        folder: where the checkpoint goes, on storage that all workers see.
        model: the model; torch's wrappers around it do not matter. Buffers that differ between
            workers (BatchNorm's) are saved as rank 0 has them.
        optimizer: a GMC or DGC over the model's parameters, which FSDP2 may have sharded.
        extra: what else the run needs, such as a scheduler's state_dict or the epoch: tensors,
            numbers, strings and containers of them. Rank 0's is saved.
        wait: False copies the state and writes it in the background while the training goes on,
            even after the process group was destroyed. The next save and the end of the script
            wait for it.
        keep: how many older checkpoints stay beside the new one.

    Returns:
        A future whose ``result()`` waits for the end of the writing, and raises if it failed. If
        nobody reads a failure, the next save or the end of the script warns about it.

    Raises:
        TypeError: the optimizer is not a GMC or DGC, or torch.load(weights_only=True) would refuse
            extra, or an entry that you have added to a param group or to the optimizer's state.
        ValueError: folder or keep cannot be used.
        RuntimeError: on all workers, if one could not write, does not see the folder, or did not
            call save within the time-out of the process group. Older checkpoints are intact.

    Example::

        saved = gmc_cuda.checkpoint.save("/shared/run", model, optimizer, {"epoch": 3}, wait=False)
        ...             # the training goes on
        saved.result()  # before the next save, and at the end
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
    """Loads a checkpoint of :func:`save` into model and optimizer. All workers must call it.

    On the same number of workers each gets its own memory, and the run continues bit for bit. On
    another number each gets the mean of the saved memories, so that nothing unsent is lost, and
    rank 0's of what users have added to the optimizer's state. Of
    sharded models the number of nodes may change, but not the number of workers in a node.

    Args:
        folder, model, optimizer: as for :func:`save`.
        name: the subfolder of an older checkpoint. Default: the current one.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: no worker finds a complete checkpoint in the folder.
        ValueError: the checkpoint is of another method, model or format; nothing was changed.
        RuntimeError: on all workers, if the checkpoint is damaged or one of them cannot read it;
            nothing was changed. The error names older checkpoints that can be loaded.
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
    """One save: its constructor makes the part, which all workers must see. Collective."""

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
        """Writes this worker's files, and publishes the part once all workers have written."""
        report: meeting.Report = {"files": {}}
        try:
            for name, value in self._files.items():
                report["files"][name] = parts.write(self._part / name, value)
        except Exception as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        self._files = {}
        answer = self._council.decide(report, _gather_files)
        if "error" not in answer:
            answer = self._council.decide(self._verify(answer["files"]), self._publish)
        if "error" in answer:
            self._clear()
            raise RuntimeError(f"{_NOT_SAVED}; {answer['error']}; {_INTACT}")

    def _verify(self, files: list[parts.Listing]) -> meeting.Report:
        """Reads what the next worker has written, which checks each file on another worker."""
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
        elif self._rank == 0:
            parts.empty(self._part)  # other workers may still read notes; the next save removes it


def _gather_files(everyone: list[meeting.Report]) -> meeting.Report:
    failed = _failures(everyone)
    return {"error": failed} if failed else {"files": [report["files"] for report in everyone]}


def _failures(everyone: list[meeting.Report]) -> str:
    errors = [(rank, report.get("error")) for rank, report in enumerate(everyone)]
    return "; ".join(f"worker {rank}: {error}" for rank, error in errors if error)


def _read(
    folder: str | os.PathLike[str],
    name: str | None,
    model: torch.nn.Module,
    optimizer: CompressedSGD,
    everyone: Exchange,
) -> snapshot.Found:
    """Reads, on every worker, what it needs of the part that rank 0 finds."""
    found: list[snapshot.Found] = []

    def find() -> str:
        return parts.find(parts.folder_of(folder), name).name

    def read() -> None:
        part = parts.folder_of(folder) / there
        if there != names[everyone.rank]:  # this worker sees an older state, or another disk
            _wait_until_seen(part, everyone.rank, str(part))
        try:
            found.append(snapshot.read(part, model, optimizer))
        except parts.Damaged as error:
            raise parts.Damaged(
                f"the checkpoint is damaged: {error}{parts.others(part.parent, part)}"
            ) from error

    names = _together(everyone, optimizer, find, "the checkpoint was not loaded")
    there = names[0]
    _together(everyone, optimizer, read, "the checkpoint was not loaded")
    return found[0]


def _together(
    everyone: Exchange, optimizer: CompressedSGD, action: Callable[[], Any], outcome: str
) -> list[Any]:
    """What the action returned on each worker, in rank order. If it fails on one, all raise."""
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as met:
        error = met
    text = error and f"{type(error).__name__}: {error}"
    answers = everyone.gather_objects((text, result), engine.device_of(optimizer))
    failed = [(rank, text) for rank, (text, _) in enumerate(answers) if text]
    if not failed:
        return [result for _, result in answers]
    # A script that gets FileNotFoundError trains from the beginning, so all must get it or none.
    nowhere = all(text.startswith(FileNotFoundError.__name__) for _, text in failed)
    if isinstance(error, FileNotFoundError) and nowhere and len(failed) == len(answers):
        raise error
    if isinstance(error, (RuntimeError, ValueError, TypeError)):
        raise error
    reasons = "; ".join(f"worker {rank}: {text}" for rank, text in failed)
    if nowhere:
        reasons += ". The folder must be on storage that all workers see"
    raise RuntimeError(f"{outcome}; {reasons}") from error


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
    """The workers that save together: all that train, with all shards."""
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
