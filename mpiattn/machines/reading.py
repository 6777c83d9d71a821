"""Files that are read, and the memory that there is for what they hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import InputError

TERMINALS = ("/dev/tty", "/dev/pts/")


def content(path: Path) -> bytes:
    """Return the bytes of a file, a pipe or a terminal.

    Raises
    ------
    InputError
        Where it is another device, such as /dev/zero, which may never end.
    OSError
        Where it can't be read.
    """
    if stat.S_ISCHR(path.stat().st_mode) and not os.path.realpath(path).startswith(TERMINALS):
        raise InputError(f"{path} is a device, not a file")
    return path.read_bytes()


def memory() -> int:
    """Return how many bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(nbytes: int, what: str) -> None:
    """Raise InputError where something takes more bytes of memory than this machine has."""
    if nbytes > memory():
        raise InputError(f"{what} takes {nbytes:.3g} bytes, and this machine has {memory():.3g}")
