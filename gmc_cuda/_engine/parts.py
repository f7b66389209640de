"""A checkpoint's folder on disk: its parts, which of them are complete, and which is current.

Each save writes into a part of its own, a subfolder. A part is complete once it has ``files.json``,
which is written last and lists every file's size and checksum, as computed by the worker that wrote
the file. Then the file ``current`` is replaced by one that names the part, and only then are older
parts removed. So wherever a save breaks off, ``current`` names a complete part.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

Listing = dict[str, tuple[int, str]]  # size in bytes and checksum, by file name

CURRENT, FACTS, NOTES = "current", "facts.pt", "notes"
_LIST, _TOKEN = "files.json", "token"
_NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}")
_OLD_NAME = re.compile(r"[0-9a-f]{8}")  # parts of format 2, which have no list
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Damaged(RuntimeError):
    """A file of a part differs from what was written."""


def folder_of(given: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path, because the script may change directory during a save.

    Raises:
        ValueError: it is not a path of a file system.
    """
    text = os.fsdecode(given)
    if _URL.match(text):
        raise ValueError(
            f"folder: got the URL {text!r}, must be a folder of a file system that all workers "
            "see. Mount the bucket, or save into such a folder and copy it once result() has "
            "returned:\n"
            "    gmc_cuda.checkpoint.save('/shared/run', model, optimizer).result()"
        )
    folder = os.path.expanduser(text)
    if folder.startswith("~"):
        raise ValueError(f"folder: got {text!r}, must name the home of a user that exists")
    return Path(folder).absolute()


def begin(folder: Path) -> Path:
    """Makes a new part, with a token by which other workers recognise the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_incomplete(folder)
    number = 1 + max((_number(part) for part in folder.iterdir()), default=0)
    part = folder / f"{number:06d}-{secrets.token_hex(4)}"
    part.mkdir()
    (part / _TOKEN).write_text(part.name)
    return part


def is_seen(part: Path) -> bool:
    """Whether this worker sees the part that another worker made."""
    try:
        return (part / _TOKEN).read_text() == part.name
    except FileNotFoundError:
        return False


def write(path: Path, value: Any) -> tuple[int, str]:
    """Writes a file by torch.save; returns its size in bytes and its checksum."""
    with path.open("wb") as file:
        counting = _Counting(file)
        torch.save(value, cast(IO[bytes], counting))
        file.flush()
        os.fsync(file.fileno())
    return counting.size, counting.checksum.hexdigest()


class _Counting:
    """A file that keeps the size and the checksum of what is written to it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.size = 0
        self.checksum = _checksum()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()


def verify(part: Path, name: str, size: int, checksum: str) -> None:
    """Reads a file, and raises Damaged unless it is what its writer wrote."""
    path = part / name
    try:
        found = path.stat().st_size
        if found != size:
            raise Damaged(f"{path} has {found} bytes, must have {size}")
        got = _checksum_of(path)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    if got != checksum:
        raise Damaged(f"{path} has the checksum {got}, must have {checksum}")


def _checksum_of(path: Path) -> str:
    checksum, chunk = _checksum(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            checksum.update(memoryview(chunk)[:count])
    return checksum.hexdigest()


def _checksum() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def publish(part: Path, listing: Listing, keep: int) -> None:
    """Makes the part complete and current, and removes all but the `keep` parts before it."""
    folder = part.parent
    _replace(part / _LIST, json.dumps(listing, indent=1))
    _flush(part)
    _replace(folder / CURRENT, part.name)
    _flush(folder)
    older = [other for other in complete(folder) if other != part]
    for other in older[keep:]:
        remove(other)


def remove(part: Path) -> None:
    """Removes a part, beginning with the file that makes it complete."""
    for name in (_LIST, ".metadata"):
        (part / name).unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)


def empty(part: Path) -> None:
    """Frees the disk space of a part that did not become complete, but keeps the notes in it."""
    for file in part.glob("*.pt"):
        file.unlink(missing_ok=True)


def complete(folder: Path) -> list[Path]:
    """The complete parts, newest first."""
    parts = [part for part in folder.iterdir() if _is_complete(part)]
    return sorted(parts, key=lambda part: (_number(part), part.stat().st_mtime), reverse=True)


def find(folder: Path, name: str | None) -> Path:
    """The part to load: the current one, or the one of this name.

    Raises:
        FileNotFoundError: there is no such part.
        Damaged: ``current`` names a part that is not complete.
    """
    if name is None:
        try:
            name = (folder / CURRENT).read_text().strip()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no complete checkpoint in {folder}" + others(folder, None)
            ) from None
        if not name or "/" in name or not _is_complete(folder / name):
            raise Damaged(
                f"{folder / CURRENT} names {name!r}, must name a complete checkpoint"
                + others(folder, None)
            )
    elif not _is_complete(folder / name):
        raise FileNotFoundError(
            f"name: there is no complete checkpoint {name!r} in {folder}" + others(folder, None)
        )
    return folder / name


def listing(part: Path) -> Listing | None:
    """The sizes and checksums that the part's files must have; None for format 2."""
    try:
        found = json.loads((part / _LIST).read_text())
        return {name: (int(size), str(checksum)) for name, (size, checksum) in found.items()}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError):
        raise Damaged(f"{part / _LIST} is not what was written") from None


def others(folder: Path, part: Path | None) -> str:
    """The end of an error text: how to load each of the other complete parts."""
    try:
        names = [other.name for other in complete(folder) if other != part]
    except OSError:
        names = []
    if not names:
        return ""
    lines = "".join(
        f"\n    gmc_cuda.checkpoint.load({str(folder)!r}, model, optimizer, name={name!r})"
        for name in names
    )
    return f". Complete checkpoints, newest first:{lines}"


def _is_complete(part: Path) -> bool:
    if _NAME.fullmatch(part.name):
        return (part / _LIST).is_file()
    # torch.distributed.checkpoint writes .metadata last.
    is_old = _OLD_NAME.fullmatch(part.name) and (part / FACTS).is_file()
    return bool(is_old) and (part / ".metadata").is_file()


def _number(part: Path) -> int:
    match = _NAME.fullmatch(part.name)
    return int(match[1]) if match else 0


def _remove_incomplete(folder: Path) -> None:
    """Removes the parts that saves left when they were killed."""
    for part in folder.iterdir():
        old = _OLD_NAME.fullmatch(part.name) and (part / FACTS).is_file()
        if (old or _NAME.fullmatch(part.name)) and not _is_complete(part):
            remove(part)


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _flush(folder: Path) -> None:
    """Flushes a folder's entries to the disk, on file systems that can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
