"""What rank 0 does for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import InputError
from ..messages.message import Communicator

Result = TypeVar("Result")


def on_root(comm: Communicator, work: Callable[[], Result]) -> Result | None:
    """Return what `work` returns on rank 0, None elsewhere; what it finds wrong is raised on every rank."""
    result, error = None, None
    if comm.Get_rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as wrong:
            error = str(wrong)
    error = comm.bcast(error)
    if error is not None:
        raise InputError(error)
    return result


def check_folders(*paths: Path | None) -> None:
    """Raise InputError, before any work, where one of the files that are to be written has no folder, or is one."""
    for path in paths:
        if path is not None and path.is_dir():
            raise InputError(f"{path}: is a folder, not a file")
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder")


def patiently(comm: Communicator, work: Callable[[], Result]) -> Result | None:
    """Return what `work` returns on rank 0, None elsewhere; the others leave the cores to it."""
    result = work() if comm.Get_rank() == 0 else None
    done = comm.Ibarrier()
    while not done.Test():
        time.sleep(0.01)
    return result
