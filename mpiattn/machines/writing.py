"""Files that are written: found to be writable before the work, and afterwards complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, WriteError

PROBE = b"\0" * 4096
"""Text that is written to find out whether the disk has room: more than its smallest unit."""


UNDER_WAY: set[Path] = set()
"""New files that are not complete: a process that ends at once removes them."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which takes its place at the end of the with block.

    Where the block fails, the new file is removed and `path` is as it was. What is no file but a device or a pipe,
    such as /dev/stdout, is written to as it is.

    Raises
    ------
    WriteError
        Where the disk is full, or the file can't be written for another reason.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            yield Path(path)
            return
        with _beside(path) as (part, target):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # some file systems find only now that there is no room
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, document: object) -> None:
    """Write a JSON file, with null for numbers that are not finite, which JSON has not; see `replacing`."""
    write_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    """Return a document with None in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(*paths: Path | None) -> None:
    """Raise InputError where one of the files can't be written: no such folder, no permission, no room."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not a file")
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{path}: no permission to write it")
        if path.exists() and not path.is_file():
            continue
        try:
            with _beside(path) as (part, _):
                part.write_bytes(PROBE)
        except OSError as error:
            raise InputError(f"{path}: can't be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _beside(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield a path for a new file in the folder of a file, and the file's own without links; remove what is left."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".mpiattn-{os.getpid()}{target.suffix}")
    UNDER_WAY.add(part)
    try:
        yield part, target
    finally:
        UNDER_WAY.discard(part)
        part.unlink(missing_ok=True)
