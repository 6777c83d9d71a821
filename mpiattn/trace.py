"""TracedComm: a communicator that keeps a record of each message and each wait, and passes all else on.

An algorithm runs on it unchanged. Messages are counted where they arrive; the small collectives by which
the ranks agree on their input before the first message are recorded as such and not counted as traffic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import message
from .message import Communicator


@dataclass
class Event:
    """One message or wait of one rank; times in seconds of `time.perf_counter`.

    Attributes
    ----------
    kind : {"send", "receive", "wait", "agree"}
    name : str
        The tag's name, for messages.
    peer : int
        The other rank, in the communicator that was traced first; -1 where there is none.
    nbytes : int
    start, end : float
        From the call that posted it to the call that found it complete.
    """

    kind: str
    name: str
    peer: int
    nbytes: int
    start: float
    end: float = float("nan")


@dataclass
class Trace:
    """The events of one rank, in the order in which they began."""

    events: list[Event] = field(default_factory=list)

    def received(self) -> tuple[int, int]:
        """Return the number of messages received and their bytes."""
        sizes = [event.nbytes for event in self.events if event.kind == "receive"]
        return len(sizes), sum(sizes)

    def waited(self) -> float:
        """Return the seconds spent in waits for messages."""
        return sum(event.end - event.start for event in self.events if event.kind == "wait")

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()


class TracedRequest:
    """A request whose completion is recorded."""

    def __init__(self, request: Any, event: Event, trace: Trace) -> None:
        self.request, self.event, self.trace = request, event, trace

    @staticmethod
    def Waitall(requests: Sequence[TracedRequest]) -> None:
        """Wait for all, and record how long that took."""
        start = time.perf_counter()
        message.Waitall([request.request for request in requests])
        end = time.perf_counter()
        _complete(requests, end)
        requests[0].trace.events.append(Event("wait", "", -1, 0, start, end))

    @staticmethod
    def Testall(requests: Sequence[TracedRequest]) -> bool:
        """Let messages progress; record it if all are complete."""
        done = message.Testall([request.request for request in requests])
        if done:
            _complete(requests, time.perf_counter())
        return done


def _complete(requests: Sequence[TracedRequest], end: float) -> None:
    for request in requests:
        if request.event.end != request.event.end:  # not a number yet: seen complete now
            request.event.end = end


class TracedComm:
    """A communicator with mpi4py's methods that records what goes over it.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    trace : Trace, optional
        Where to record; communicators made from this one share it.
    ranks : list of int, optional
        The rank in the first traced communicator of each rank of this one.
    """

    def __init__(self, comm: Communicator, trace: Trace | None = None, ranks: list[int] | None = None) -> None:
        self.comm = comm
        self.trace = trace or Trace()
        self.ranks = ranks or list(range(comm.Get_size()))

    def _derived(self, comm: Communicator) -> TracedComm:
        own = self.ranks[self.comm.Get_rank()]
        return TracedComm(comm, self.trace, comm.allgather(own))

    # Topology

    def Get_size(self) -> int:
        """Return the number of ranks."""
        return int(self.comm.Get_size())

    def Get_rank(self) -> int:
        """Return this rank."""
        return int(self.comm.Get_rank())

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = False) -> TracedComm:
        """Make a Cartesian communicator."""
        return self._derived(self.comm.Create_cart(dims, periods, reorder))

    def Sub(self, remain_dims: Sequence[bool]) -> TracedComm:
        """Make the communicator of a row or a column of a grid."""
        return self._derived(self.comm.Sub(remain_dims))

    def Shift(self, direction: int, disp: int) -> tuple[int, int]:
        """Return (source, dest) along a dimension of a grid."""
        source, dest = self.comm.Shift(direction, disp)
        return source, dest

    def Get_coords(self, rank: int) -> list[int]:
        """Return a rank's coordinates in a grid."""
        return list(self.comm.Get_coords(rank))

    def Free(self) -> None:
        """Free the communicator."""
        self.comm.Free()

    # Messages

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> TracedRequest:
        """Start to send a buffer."""
        return self._post("send", self.comm.Isend, buf, dest, tag)

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> TracedRequest:
        """Start to receive into a buffer."""
        return self._post("receive", self.comm.Irecv, buf, source, tag)

    def _post(self, kind: str, call: Any, buf: Any, peer: int, tag: int) -> TracedRequest:
        name = message.Tag(tag).name
        nbytes = (buf[0] if isinstance(buf, list) else buf).nbytes
        event = Event(kind, name, self.ranks[peer], nbytes, time.perf_counter())
        self.trace.events.append(event)
        return TracedRequest(call(buf, peer, tag), event, self.trace)

    # Agreement

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
        """Exchange what ranks must agree on."""
        self._agree(self.comm.Allgather, sendbuf, recvbuf)

    def allgather(self, value: Any) -> Any:
        """Exchange what ranks must agree on."""
        return self._agree(self.comm.allgather, value)

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Tell all ranks what one knows."""
        self._agree(self.comm.Bcast, buf, root)

    def _agree(self, call: Any, *arguments: Any) -> Any:
        event = Event("agree", call.__name__, -1, 0, time.perf_counter())
        self.trace.events.append(event)
        result = call(*arguments)
        event.end = time.perf_counter()
        return result
