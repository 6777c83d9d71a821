"""Work that rank 0 does for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import InputError, WriteError
from ..messages.message import Communicator, Testall

Result = TypeVar("Result")


def on_root(comm: Communicator, work: Callable[[], Result]) -> Result | None:
    """Return what `work` returns on rank 0, None elsewhere; what it finds wrong is raised on every rank."""

    def judged() -> Result:
        try:
            return work()
        except WriteError:
            raise
        except (OSError, ValueError, MemoryError) as wrong:
            raise InputError(str(wrong)) from None

    return patiently(comm, judged)


def patiently(comm: Communicator, work: Callable[[], Result]) -> Result | None:
    """Return what `work` returns on rank 0, None elsewhere; the others leave the cores to it.

    An InputError or a WriteError of rank 0 is raised on every rank.
    """
    result, error = None, None
    if comm.Get_rank() == 0:
        try:
            result = work()
        except (InputError, WriteError) as wrong:
            error = wrong
    done = comm.Ibarrier()
    while not Testall([done]):
        time.sleep(0.01)
    error = comm.bcast(error)
    if error is not None:
        raise error
    return result
