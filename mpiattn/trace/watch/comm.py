"""A communicator that leaves a record of each message, wait and collective, and passes all else on.

An algorithm runs on it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from mpi4py import MPI

from ...messages import connection, message
from ...messages.device.channel import Channel
from .record import Kind, Recorder, State
from .request import numbered

SEND, RECEIVE, DONE = Kind.SEND, Kind.RECEIVE, Kind.DONE
NAMED = 32  # tags below have names
PEER = 2**32  # tags are smaller


class WatchedWindow:
    """A window of shared memory whose fences are recorded."""

    def __init__(self, window: message.Window, comm: WatchedComm) -> None:
        self.window, self.comm = window, comm

    def Fence(self) -> None:
        """Wait for the other ranks, and see what they wrote."""
        self.comm.blocking("Fence", self.window.Fence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.window, name)


def _blocking(name: str) -> Any:
    """Return a method that records a collective which waits for other ranks."""

    def method(self: WatchedComm, *arguments: object, **named: object) -> Any:
        return self.blocking(name, getattr(self.comm, name), *arguments, **named)

    method.__name__, method.__doc__ = name, f"As `MPI.Comm.{name}`."
    return method


def _deriving(name: str) -> Any:
    """Return a method that makes a communicator, which is watched too."""

    def method(self: WatchedComm, *arguments: object, **named: object) -> Any:
        comm = self.blocking(name, getattr(self.comm, name), *arguments, **named)
        return comm if comm == MPI.COMM_NULL else self.derived(comm, name)

    method.__name__, method.__doc__ = name, f"As `MPI.Comm.{name}`."
    return method


class WatchedComm:
    """A communicator with mpi4py's methods that leaves a record of what this rank does with it.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    recorder : Recorder
        Communicators made from this one share it.
    ranks : tuple of int
        The rank in the first watched communicator of each rank of this one.
    path : str
        How this one was made from the first one.
    """

    def __init__(self, comm: Any, recorder: Recorder, ranks: tuple[int, ...], path: str) -> None:
        self.comm, self.recorder, self.ranks, self.path = comm, recorder, ranks, path
        self.size, self.rank = comm.size, comm.rank
        self.number = recorder.comm(path, ranks)
        self.counts = recorder.counts[self.number]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    # Messages

    def Isend(self, buf: object, dest: int, tag: int = 0) -> message.Request:
        """Start to send a buffer."""
        return self._posted(SEND, self.comm.Isend(buf, dest, tag), buf, dest, tag)

    def Irecv(self, buf: object, source: int, tag: int = 0) -> message.Request:
        """Start to receive into a buffer."""
        return self._posted(RECEIVE, self.comm.Irecv(buf, source, tag), buf, source, tag)

    def Send(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send a buffer."""
        message.Waitall([self.Isend(buf, dest, tag)])

    def Recv(self, buf: object, source: int, tag: int = 0) -> None:
        """Receive into a buffer."""
        message.Waitall([self.Irecv(buf, source, tag)])

    def _posted(self, kind: int, request: message.Request, buf: Any, peer: int, tag: int) -> message.Request:
        recorder, counts = self.recorder, self.counts
        key = (peer * PEER + tag) * 2 + kind
        counts[key] = number = counts.get(key, 0) + 1
        recorder.posts = post = recorder.posts + 1
        nbytes = (buf[0] if type(buf) is list else buf).nbytes
        name = tag if 0 <= tag < NAMED else recorder.name(f"tag {tag}")
        recorder.write(kind, name, self.number, self.ranks[peer] if peer >= 0 else -1, number, post, nbytes)
        return numbered(request, recorder, post)

    # Collectives

    def Iallgatherv(self, sendbuf: object, recvbuf: object) -> message.Request:
        """Start to give every rank the pieces of all."""
        return self._started("Iallgatherv", self.comm.Iallgatherv(sendbuf, recvbuf))

    def Ibarrier(self) -> message.Request:
        """Start to wait for all ranks."""
        return self._started("Ibarrier", self.comm.Ibarrier())

    def _started(self, name: str, request: message.Request) -> message.Request:
        recorder = self.recorder
        recorder.posts = post = recorder.posts + 1
        recorder.write(Kind.START, recorder.name(name), self.number, -1, self._collective(), post, 0)
        return numbered(request, recorder, post)

    def blocking(self, name: str, call: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """Call a collective that waits for other ranks."""
        recorder = self.recorder
        recorder.step = step = recorder.step + 1
        recorder.write(Kind.CALL, recorder.name(name), self.number, -1, self._collective(), step, 0)
        result = call(*arguments, **named)
        recorder.write(DONE, 0, 0, 0, 0, 0, 0)
        return result

    def _collective(self) -> int:
        self.counts[-1] = number = self.counts.get(-1, 0) + 1
        return number

    Allgather = _blocking("Allgather")
    Allgatherv = _blocking("Allgatherv")
    Alltoallv = _blocking("Alltoallv")
    Barrier = _blocking("Barrier")
    Bcast = _blocking("Bcast")
    allgather = _blocking("allgather")
    allreduce = _blocking("allreduce")
    barrier = _blocking("barrier")
    bcast = _blocking("bcast")
    gather = _blocking("gather")

    def Abort(self, errorcode: int = 0) -> None:
        """End the job; MPI says which rank did."""
        self.recorder.state(State.TOLD)  # the launcher may kill the others before it
        self.comm.Abort(errorcode)

    # Communicators and memory made from this one

    Create_cart = _deriving("Create_cart")
    Dup = _deriving("Dup")
    Split = _deriving("Split")
    Split_type = _deriving("Split_type")
    Sub = _deriving("Sub")

    def private(self) -> Any:
        """Return the private duplicate, watched; see `connection.private`."""
        inner = connection.private(self.comm)
        if inner is self.comm or isinstance(inner, WatchedComm):
            return self if inner is self.comm else inner
        return WatchedComm(inner, self.recorder, self.ranks, f"{self.path}.private")

    def on_device(self, xp: ModuleType, mode: str) -> tuple[WatchedComm, Channel]:
        """Return what carries device memory, watched: each message once, by its own name."""
        inner, channel = connection.on_device(self.comm, xp, mode)
        return WatchedComm(inner, self.recorder, self.ranks, self.path), channel

    def derived(self, comm: MPI.Comm, how: str) -> WatchedComm:
        """Return a communicator of some of these ranks, watched."""
        return WatchedComm(comm, self.recorder, self.translate(comm), f"{self.path}.{how}")

    def translate(self, comm: MPI.Comm) -> tuple[int, ...]:
        """Return the rank in the first watched communicator of each rank of another; -1 of those that it lacks."""
        here, there = self.comm.Get_group(), comm.Get_group()
        ranks = there.Translate_ranks(range(comm.size), here)
        here.Free()
        there.Free()
        return tuple(-1 if rank == MPI.UNDEFINED else self.ranks[rank] for rank in ranks)

    def Allocate_shared(self, nbytes: int) -> WatchedWindow:
        """Make a window of memory that the ranks of a host share; see `message.Allocate_shared`."""
        return WatchedWindow(message.Allocate_shared(self.comm, nbytes), self)
