"""Requests of an algorithm to the communicator that it is built on: MPI's, a traced one, or a virtual one.

Those that stand in for MPI's answer by methods of the same names.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.operations import of
from ..errors import InputError
from .device.comm import carrier
from .message import Communicator
from .observer import watched


def private(comm: object) -> Any:
    """Return the duplicate of a communicator on which this package's messages never meet the caller's.

    MPI's is made once and kept with the communicator, see `private`; those that stand in for MPI's have a method that
    does this, `private()`. What is private already stays as it is. Inside of `mpiattn.watch` it is watched.

    Raises
    ------
    InputError
        Where that is no communicator, has been freed, or connects two groups of ranks.
    """
    if hasattr(comm, "private"):
        return comm.private()
    check(comm)
    from .private import duplicate

    return watched(duplicate(comm))  # type: ignore[arg-type]


def check(comm: object) -> None:
    """Raise InputError where that is no communicator, has been freed, or connects two groups of ranks."""
    if hasattr(comm, "private"):  # it stands in for MPI's
        return
    if comm is None:
        raise InputError("comm is None: give an MPI communicator, such as MPI.COMM_WORLD")
    from mpi4py import MPI

    if not isinstance(comm, MPI.Comm):
        raise InputError(f"comm is no MPI communicator but {type(comm).__name__}: give one, such as MPI.COMM_WORLD")
    if comm == MPI.COMM_NULL:
        raise InputError("comm has been freed, or is none on this rank: give a communicator that all callers are in")
    if not isinstance(comm, MPI.Intracomm):
        raise InputError("comm connects two groups of ranks: give an intracommunicator, such as comm.Merge()")


def rows(comm: Any, row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of all ranks, to be read only: an all-gather.

    Virtual ranks share one array, by a method `rows(row)`: a thousand of them, each with a row of each, take 0.3 GB.
    """
    if hasattr(comm, "rows"):
        shared: NDArray[np.int64] = comm.rows(row)
        return shared
    everything = np.empty((comm.Get_size(), len(row)), row.dtype)
    comm.Allgather(row, everything)
    return everything


def abandon(comm: object, memory: object) -> None:
    """Leave a private communicator to itself, and memory that messages under way on it may still read and write."""
    if hasattr(comm, "abandon"):
        comm.abandon(memory)


def freed(comm: Any) -> bool:
    """Return whether a private communicator is gone, with its owner."""
    inner = getattr(comm, "comm", comm)
    return hasattr(inner, "kept") and not inner


def kernel_on(comm: Any, kernel: Any) -> Any:
    """Return the kernel as a communicator wants it: a traced one records it, a virtual one lets it move the clock.

    Those that do so have a method `kernel(kernel)`; on any other the kernel stays as it is.
    """
    return comm.kernel(kernel) if hasattr(comm, "kernel") else kernel


def on_device(comm: Any, xp: ModuleType, mode: str) -> tuple[Any, Any]:
    """Return a communicator that carries device memory over a private one, and its channel; see `device`.

    All ranks call it together; what is found out and made is kept with the private communicator.
    """
    if hasattr(comm, "on_device"):
        return comm.on_device(xp, mode)  # type: ignore[no-any-return]
    return carrier(comm, xp, mode)


def carrying(comm: Communicator, xp: ModuleType, mode: str = "auto") -> Communicator:
    """Return what sends arrays of a namespace over a private communicator: itself, but for those of GPUs."""
    if of(xp).QUEUED:
        comm, _ = on_device(comm, xp, mode)
    return comm
