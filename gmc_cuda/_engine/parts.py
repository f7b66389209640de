"""The folder of a checkpoint on disk: its parts, what makes one whole, and which is current.

A save writes into a part of its own, a subfolder. The part's ``files.json`` comes last: it lists
the size and the checksum of every file, as the worker that wrote the file counted them on the way
to the disk. A part with that list is complete. Then the file ``current`` is replaced by one that
names the part, and only then are older parts removed. So whenever a save ends, by a full disk or a
killed worker, ``current`` names a whole part.
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

Listing = dict[str, tuple[int, str]]  # size and checksum by the name of a file

CURRENT, FACTS, NOTES = "current", "facts.pt", "notes"
_LIST, _TOKEN = "files.json", "token"
_NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}")
_OLD_NAME = re.compile(r"[0-9a-f]{8}")  # of format 2, which had no list
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Damaged(RuntimeError):
    """A part that is not as it was written."""


def folder_of(given: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path: the script may change its own before the save has ended.

    Raises:
        ValueError: it is no path of a file system.
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
    """Makes a new part, with a token by which other workers recognise it."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_incomplete(folder)
    number = 1 + max((_number(part) for part in folder.iterdir()), default=0)
    part = folder / f"{number:06d}-{secrets.token_hex(4)}"
    part.mkdir()
    (part / _TOKEN).write_text(part.name)
    return part


def is_seen(part: Path) -> bool:
    """Whether the part that another worker made is here too."""
    try:
        return (part / _TOKEN).read_text() == part.name
    except FileNotFoundError:
        return False


def write(path: Path, value: Any) -> tuple[int, str]:
    """torch.save; returns the size and the checksum of what went to the disk."""
    with path.open("wb") as file:
        counting = _Counting(file)
        torch.save(value, cast(IO[bytes], counting))
        file.flush()
        os.fsync(file.fileno())
    return counting.size, counting.checksum.hexdigest()


class _Counting:
    """A file that counts and sums up what is written to it."""

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
    """Reads a file and raises Damaged unless it is what its writer had written."""
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
    """Makes the part complete and current; of those before it, `keep` stay."""
    folder = part.parent
    _replace(part / _LIST, json.dumps(listing, indent=1))
    _flush(part)
    _replace(folder / CURRENT, part.name)
    _flush(folder)
    older = [other for other in complete(folder) if other != part]
    for other in older[keep:]:
        remove(other)


def remove(part: Path) -> None:
    """Removes a part, first what makes it complete."""
    for name in (_LIST, ".metadata"):
        (part / name).unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)


def empty(part: Path) -> None:
    """Gives the room of a part back that did not become complete; what workers said stays."""
    for file in part.glob("*.pt"):
        file.unlink(missing_ok=True)


def complete(folder: Path) -> list[Path]:
    """The complete parts, the newest first."""
    parts = [part for part in folder.iterdir() if _is_complete(part)]
    return sorted(parts, key=lambda part: (_number(part), part.stat().st_mtime), reverse=True)


def find(folder: Path, name: str | None) -> Path:
    """The part to load: the current one, or the one of this name.

    Raises:
        FileNotFoundError: there is none.
        Damaged: the current one is not whole.
    """
    if name is None:
        try:
            name = (folder / CURRENT).read_text().strip()
        except FileNotFoundError:
            told = f"there is no complete checkpoint in {folder}"
            raise FileNotFoundError(told + others(folder, None)) from None
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
    """What its files must be; None of format 2."""
    try:
        found = json.loads((part / _LIST).read_text())
        return {name: (int(size), str(checksum)) for name, (size, checksum) in found.items()}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError):
        raise Damaged(f"{part / _LIST} is not what was written") from None


def others(folder: Path, part: Path | None) -> str:
    """The other complete parts, for the end of an error: how each is loaded."""
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
    return f". Complete checkpoints that are there, the newest first:{lines}"


def _is_complete(part: Path) -> bool:
    if _NAME.fullmatch(part.name):
        return (part / _LIST).is_file()
    # dcp wrote .metadata last.
    is_old = _OLD_NAME.fullmatch(part.name) and (part / FACTS).is_file()
    return bool(is_old) and (part / ".metadata").is_file()


def _number(part: Path) -> int:
    match = _NAME.fullmatch(part.name)
    return int(match[1]) if match else 0


def _remove_incomplete(folder: Path) -> None:
    """Removes what saves that were killed have left."""
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
    """Brings the entries of a folder to the disk; some file systems cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
