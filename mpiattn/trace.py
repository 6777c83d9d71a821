"""Traces: what each rank computed, sent, received and waited for, recorded.

`TracedComm` is a communicator that keeps a record of each message and each wait, and passes all else on;
`TracedKernel` does so for each block of compute. An algorithm runs on them unchanged, and without them nothing
is recorded and nothing is spent. Messages are counted where they arrive; the small collectives by which the
ranks agree on their input before the first message are recorded as such and not counted as traffic.

`timeline.py` gathers the events of all ranks into one file and shows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import message
from .message import Communicator


@dataclass
class Event:
    """One message, wait, block or phase of one rank; times in seconds of `message.clock`.

    Attributes
    ----------
    kind : {"send", "receive", "wait", "agree", "compute", "phase"}
    name : str
        The tag's name, for messages; forward or backward, for blocks.
    peer : int
        The other rank, in the communicator that was traced first; -1 where there is none.
    nbytes : int
    start, end : float
        From the call that posted it to the call that found it complete; end is not a number before.
    block : (int, int), optional
        First global position of a block's queries and of its keys.
    """

    kind: str
    name: str
    peer: int
    nbytes: int
    start: float
    end: float = float("nan")
    block: tuple[int, int] | None = None


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
        return self.spent("wait")

    def spent(self, kind: str) -> float:
        """Return the seconds of all events of a kind."""
        return sum(event.end - event.start for event in self.events if event.kind == kind)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give a name to the time of a with block, such as the forward pass of one algorithm."""
        event = Event("phase", name, -1, 0, message.clock())
        self.events.append(event)
        yield
        event.end = message.clock()

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()


class TracedRequest:
    """A request whose completion is recorded."""

    def __init__(self, request: Any, events: Sequence[Event], trace: Trace) -> None:
        self.request, self.events, self.trace = request, events, trace

    @staticmethod
    def Waitall(requests: Sequence[TracedRequest]) -> None:
        """Wait for all, and record how long that took."""
        start = message.clock()
        message.Waitall([request.request for request in requests])
        end = message.clock()
        _complete(requests, end)
        requests[0].trace.events.append(Event("wait", "", -1, 0, start, end))

    @staticmethod
    def Testall(requests: Sequence[TracedRequest]) -> bool:
        """Let messages progress; record it if all are complete."""
        done = message.Testall([request.request for request in requests])
        if done:
            _complete(requests, message.clock())
        return done


def _complete(requests: Sequence[TracedRequest], end: float) -> None:
    for event in (event for request in requests for event in request.events):
        if event.end != event.end:  # not a number yet: seen complete now
            event.end = end


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

    def Get_cart_rank(self, coords: Sequence[int]) -> int:
        """Return the rank at coordinates of a grid."""
        return int(self.comm.Get_cart_rank(coords))

    def Split(self, color: int = 0, key: int = 0) -> TracedComm:
        """Make a communicator of the ranks that give one color, in the order of their keys."""
        return self._derived(self.comm.Split(color, key))

    def Split_type(self, split_type: Any, key: int = 0) -> TracedComm:
        """Make a communicator of the ranks that share something, such as a host."""
        return self._derived(self.comm.Split_type(split_type, key))

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
        event = Event(kind, name, self.ranks[peer], nbytes, message.clock())
        self.trace.events.append(event)
        return TracedRequest(call(buf, peer, tag), [event], self.trace)

    # Collectives: counted as one message for each piece that comes from another rank

    def Allgatherv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank the pieces of all; recvbuf is `message.Pieces`."""
        self._collective(self.comm.Allgatherv, sendbuf, recvbuf)

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give each rank its piece of every other's; recvbuf is `message.Pieces`."""
        self._collective(self.comm.Alltoallv, sendbuf, recvbuf)

    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> TracedRequest:
        """Start to give every rank the pieces of all; recvbuf is `message.Pieces`."""
        start = message.clock()
        pieces = self._pieces(recvbuf)
        events = [Event("receive", "Iallgatherv", self.ranks[peer], nbytes, start) for peer, nbytes in pieces]
        self.trace.events += events
        return TracedRequest(self.comm.Iallgatherv(sendbuf, recvbuf), events, self.trace)

    def _pieces(self, recvbuf: Sequence[Any]) -> list[tuple[int, int]]:
        buffer, counts, _, datatype = recvbuf
        unit = datatype.Get_size() if datatype else buffer.itemsize
        return [(peer, count * unit) for peer, count in enumerate(counts) if count and peer != self.Get_rank()]

    def _collective(self, call: Any, sendbuf: Any, recvbuf: Any) -> None:
        start = message.clock()
        call(sendbuf, recvbuf)
        end = message.clock()
        for peer, nbytes in self._pieces(recvbuf):
            self.trace.events.append(Event("receive", call.__name__, self.ranks[peer], nbytes, start, end))
        self.trace.events.append(Event("wait", call.__name__, -1, 0, start, end))

    # Memory of a host

    def Allocate_shared(self, nbytes: int) -> TracedWindow:
        """Make a window of memory that the ranks of a host share; see `message.Allocate_shared`."""
        return TracedWindow(message.Allocate_shared(self.comm, nbytes), self.trace)

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
        event = Event("agree", call.__name__, -1, 0, message.clock())
        self.trace.events.append(event)
        result = call(*arguments)
        event.end = message.clock()
        return result


class TracedWindow:
    """A window of shared memory whose fences are recorded as waits; nothing is received."""

    def __init__(self, window: Any, trace: Trace) -> None:
        self.window, self.trace = window, trace

    def Shared_query(self, rank: int) -> Any:
        """Return the memory of a rank's part, and its unit."""
        return self.window.Shared_query(rank)

    def Fence(self) -> None:
        """Wait for the other ranks, and see what they wrote."""
        start = message.clock()
        self.window.Fence()
        self.trace.events.append(Event("wait", "Fence", -1, 0, start, message.clock()))

    def Free(self) -> None:
        """Free the window."""
        self.window.Free()


class TracedKernel:
    """A kernel that records each block it computes, and passes all else on."""

    def __init__(self, kernel: Any, trace: Trace) -> None:
        self.kernel, self.trace = kernel, trace

    def forward(self, *arguments: Any) -> None:
        """As `NumpyKernel.forward`; the positions of queries and keys are arguments 3 and 4."""
        self._block("forward", arguments, 3)

    def backward(self, *arguments: Any) -> None:
        """As `NumpyKernel.backward`; the positions of queries and keys are arguments 6 and 7."""
        self._block("backward", arguments, 6)

    def _block(self, name: str, arguments: Sequence[Any], positions: int) -> None:
        first, second = (int(p[0]) if len(p) else -1 for p in arguments[positions : positions + 2])
        event = Event("compute", name, -1, 0, message.clock(), block=(first, second))
        self.trace.events.append(event)
        getattr(self.kernel, name)(*arguments)
        event.end = message.clock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def watch(attention: Any) -> None:
    """Record the blocks of an algorithm that was built on a `TracedComm`, beside its messages."""
    attention.kernel = TracedKernel(attention.kernel, attention.comm.trace)
