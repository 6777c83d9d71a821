"""The end of a job by one of its ranks."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import termios
import time
from typing import Any, NoReturn

PATIENCE = 5.0  # seconds for a launcher to read what a rank has said


def end_job(comm: Any, text: str, status: int = 1, file: int = 2) -> NoReturn:
    """Write a text to an open file, standard error if not given, and end all ranks."""
    with contextlib.suppress(OSError):  # nobody reads
        os.write(file, text.encode())
    for each in {1, file}:
        until_read(each)
    comm.Abort(status)
    os._exit(status)  # Abort may come back before the job has ended


def until_read(file: int, patience: float = PATIENCE) -> None:
    """Wait until nothing is left to read in a pipe: a launcher that ends a job forgets what it has not read."""
    left, end = array.array("i", [0]), time.monotonic() + patience
    with contextlib.suppress(OSError):  # no pipe
        while time.monotonic() < end:
            fcntl.ioctl(file, termios.FIONREAD, left)
            if not left[0]:
                return
            time.sleep(0.01)
