"""MPI for the algorithm files: a communicator's methods, tags, waiting, and descriptions of buffers.

It imports MPI where only MPI's own objects will do, so that virtual ranks need none.

Real, traced and virtual requests each bring their own `Waitall` and `Testall`, so these two serve all.
"""

from __future__ import annotations

import enum
import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class Request(Protocol):
    """A message that was posted: `MPI.Request`, or what stands in for it. `Waitall` and `Testall` take several."""

    @classmethod
    def Waitall(cls, requests: Sequence[Any], /) -> object: ...
    @classmethod
    def Testall(cls, requests: Sequence[Any], /) -> bool: ...


class Window(Protocol):
    """Memory that the ranks of a host share: `MPI.Win`, or what stands in for it."""

    def Shared_query(self, rank: int, /) -> tuple[Any, int]: ...
    def Fence(self) -> None: ...
    def Free(self) -> None: ...


class Communicator(Protocol):
    """A communicator: the methods of mpi4py that are used here.

    An `MPI.Intracomm` has them, and so have those that stand in for it: `trace.comm.TracedComm`, which records,
    `device.comm.DeviceComm`, which carries device memory, and `virtual.VirtualComm`. Buffers are arrays, or what
    `Rows`, `Memory` and `Pieces` return; requests go to `Waitall` and `Testall`.
    """

    # Ranks, and communicators made of some of them
    def Get_size(self) -> int: ...
    def Get_rank(self) -> int: ...
    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = ...) -> Cartesian: ...
    def Split(self, color: int = ..., key: int = ...) -> Any: ...
    def Split_type(self, split_type: int, key: int = ...) -> Any: ...
    def Free(self) -> None: ...

    # Messages
    def Isend(self, buf: Any, dest: int, tag: int = ...) -> Request: ...
    def Irecv(self, buf: Any, source: int, tag: int = ...) -> Request: ...
    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> Request: ...
    def Allgatherv(self, sendbuf: Any, recvbuf: Any) -> None: ...
    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None: ...

    # Agreement, before there are messages
    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None: ...
    def Bcast(self, buf: Any, root: int = ...) -> None: ...
    def allgather(self, sendobj: T, /) -> list[T]: ...
    def bcast(self, obj: object, /, root: int = ...) -> Any: ...

    # What commands ask besides
    def Barrier(self) -> None: ...
    def Ibarrier(self) -> Request: ...
    def gather(self, sendobj: T, /, root: int = ...) -> list[T] | None: ...


class Cartesian(Communicator, Protocol):
    """A communicator whose ranks form a grid, or a row or a column of one."""

    def Sub(self, remain_dims: Sequence[bool]) -> Cartesian: ...
    def Shift(self, direction: int, disp: int) -> tuple[int, int]: ...
    def Get_coords(self, rank: int) -> list[int]: ...
    def Get_cart_rank(self, coords: Sequence[int]) -> int: ...


class Tag(enum.IntEnum):
    """Contents of a message; shown in traces."""

    Q = 1
    KV = 2
    O = 3
    D_Q = 4
    D_KV = 5
    SCATTER = 6
    GATHER = 7
    CLOCK = 8
    QKV = 9
    D_O = 10
    D_QKV = 11


def virtual_time() -> float | None:
    """Return the seconds on the clock of the virtual rank that runs, None outside of `virtual`."""
    virtual = sys.modules.get("mpiattn.virtual")
    return virtual.now() if virtual else None


def clock() -> float:
    """Return seconds from some moment on: on the virtual rank's clock, else as `time.perf_counter`."""
    seconds = virtual_time()
    return time.perf_counter() if seconds is None else seconds


def constant(name: str) -> Any:
    """Return a constant of MPI, such as `MAX`; its name where no MPI is loaded, so where no communicator is MPI's."""
    return getattr(sys.modules.get("mpi4py.MPI"), name, name)


def Waitall(requests: Sequence[Request]) -> None:
    """Wait until every request has completed, as `MPI.Request.Waitall`."""
    if requests:
        type(requests[0]).Waitall(requests)


def Testall(requests: Sequence[Request]) -> bool:
    """Let the MPI library make progress on the requests, and say if all are complete, as `MPI.Request.Testall`."""
    return not requests or bool(type(requests[0]).Testall(requests))


PAGE = 4096  # bytes


def Allocate_shared(comm: Any, nbytes: int) -> Window:
    """Return a window with a part of that many bytes for each rank of a host, as `MPI.Win.Allocate_shared`.

    Each part begins on a page of its own, so in the memory of the processor whose rank first writes to it.
    """
    if hasattr(comm, "Allocate_shared"):
        window: Window = comm.Allocate_shared(nbytes)
        return window
    from mpi4py import MPI

    return MPI.Win.Allocate_shared(max(-(-nbytes // PAGE), 1) * PAGE, comm=comm)


def Rows(buffer: NDArray[np.uint8]) -> object:
    """Describe a buffer of bytes to a send or a receive, whatever its size.

    An MPI-3 library counts elements in a C int and fails beyond 2**31-1 of them, so a larger buffer
    becomes one element of a datatype made of rows of 1 MiB and a remainder.
    """
    return [buffer, 1, _rows(buffer.nbytes)] if _large(buffer) else buffer


def Memory(address: int, nbytes: int) -> object:
    """Describe memory, which may be a device's, to a send or a receive; at most 2**31-1 bytes."""
    from mpi4py import MPI

    return MPI.buffer.fromaddress(address, nbytes)


def Pieces(buffer: NDArray[np.uint8], sizes: Sequence[int], starts: Sequence[int] | None = None) -> list[object]:
    """Describe a buffer of bytes to a collective: a piece of each rank, one after the other where not said otherwise.

    As in `Rows`, a larger buffer is counted in a unit that all pieces and their starts are multiples of.
    """
    if not _large(buffer):
        return [buffer, list(sizes), starts, None]
    unit = math.gcd(*sizes, *(starts or ()))
    return [buffer, [size // unit for size in sizes], starts and [start // unit for start in starts], _bytes(unit)]


def _large(buffer: Array) -> bool:
    """Return whether MPI-3 can't count the bytes; an array without data, which has no strides, never meets MPI."""
    return int(buffer.nbytes) >= 2**31 and hasattr(buffer, "strides")


@functools.cache
def _bytes(nbytes: int) -> MPI.Datatype:
    from mpi4py import MPI

    return MPI.BYTE.Create_contiguous(nbytes).Commit()


@functools.cache
def _rows(nbytes: int) -> MPI.Datatype:
    from mpi4py import MPI

    row = 2**20
    rows, rest = divmod(nbytes, row)
    types = [MPI.BYTE.Create_contiguous(row), MPI.BYTE]
    return MPI.Datatype.Create_struct([rows, rest], [0, rows * row], types).Commit()
