"""A communicator that keeps a record of each message and each wait, and passes all else on.

An algorithm runs on it unchanged, and without it nothing is recorded and nothing is spent. Messages are counted
where they arrive; the small collectives by which the ranks agree on their input before the first message are
recorded as such and not counted as traffic.

Of a communicator of MPI it makes one that is itself MPI's, see `mpi_comm`; of a virtual one, or one for device
memory, it makes one that has the methods here, and no other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from ..kernels.contract import Kernel
from ..messages import connection, message
from ..messages.device.channel import Channel
from ..messages.message import Communicator, Request
from .buffers import arriving, nbytes, pieces
from .events import Event, Trace, label
from .kernel import TracedKernel
from .request import TracedRequest
from .window import TracedWindow

T = TypeVar("T")


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

    def __new__(cls, comm: Communicator, *_: object, **__: object) -> TracedComm:
        """Return an object of the class that fits the communicator."""
        mpi = sys.modules.get("mpi4py.MPI")
        if cls is TracedComm and mpi is not None and isinstance(comm, mpi.Intracomm):
            from .mpi_comm import traced_class

            kind = traced_class(comm)
            return kind.__new__(kind, comm)
        return super().__new__(cls)

    def __init__(self, comm: Communicator, trace: Trace | None = None, ranks: list[int] | None = None) -> None:
        self.comm: Any = comm
        self.trace = trace or Trace()
        self.ranks = ranks or list(range(comm.Get_size()))

    def _request(self, request: Request, events: Sequence[Event]) -> TracedRequest:
        return TracedRequest(request, events, self.trace)

    def _derived(self, comm: Communicator) -> TracedComm:
        own = self.ranks[self.comm.Get_rank()]
        return TracedComm(comm, self.trace, comm.allgather(own))

    # What is handed to an algorithm that is built on it

    def private(self) -> TracedComm:
        """Return the same record around the private duplicate; see `connection.private`."""
        inner = connection.private(self.comm)
        return self if inner is self.comm else TracedComm(inner, self.trace, self.ranks)

    def abandon(self, memory: object) -> None:
        """Leave the private duplicate to itself; see `connection.abandon`."""
        connection.abandon(self.comm, memory)

    def kernel(self, kernel: Kernel | None) -> Kernel:
        """Return the kernel, recorded; see `connection.kernel_on`."""
        return TracedKernel(connection.kernel_on(self.comm, kernel), self.trace)

    def on_device(self, xp: ModuleType, mode: str) -> tuple[TracedComm, Channel]:
        """Return the same record around what carries device memory, which sees each message once."""
        inner, channel = connection.on_device(self.comm, xp, mode)
        return TracedComm(inner, self.trace, self.ranks), channel

    # Topology

    def Get_size(self) -> int:
        """Return the number of ranks."""
        return int(self.comm.Get_size())

    def Get_rank(self) -> int:
        """Return this rank."""
        return int(self.comm.Get_rank())

    def Create_cart(
        self, dims: Sequence[int], periods: Sequence[bool] | None = None, reorder: bool = False
    ) -> TracedComm:
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

    def Split_type(self, split_type: int, key: int = 0) -> TracedComm:
        """Make a communicator of the ranks that share something, such as a host."""
        return self._derived(self.comm.Split_type(split_type, key))

    def Free(self) -> None:
        """Free the communicator."""
        self.comm.Free()

    # Messages

    def Isend(self, buf: object, dest: int, tag: int = 0) -> TracedRequest:
        """Start to send a buffer."""
        return self._post("send", self.comm.Isend, buf, dest, tag)

    def Irecv(self, buf: object, source: int, tag: int = 0) -> TracedRequest:
        """Start to receive into a buffer."""
        return self._post("receive", self.comm.Irecv, buf, source, tag)

    def _post(self, kind: str, call: Callable[..., Request], buf: object, peer: int, tag: int) -> TracedRequest:
        if peer < 0:  # beyond the edge of a grid: nothing travels
            return self._request(call(buf, peer, tag), [])
        event = Event(kind, label(tag), self.ranks[peer], nbytes(buf), message.clock())
        self.trace.events.append(event)
        return self._request(call(buf, peer, tag), [event])

    # Collectives: counted as one message for each piece that comes from another rank

    def Allgatherv(self, sendbuf: object, recvbuf: object) -> None:
        """Give every rank the pieces of all; recvbuf is `message.Pieces`."""
        self._collective("Allgatherv", (sendbuf, recvbuf), pieces(recvbuf, self.Get_size()))

    def Alltoallv(self, sendbuf: object, recvbuf: object) -> None:
        """Give each rank its piece of every other's; recvbuf is `message.Pieces`."""
        self._collective("Alltoallv", (sendbuf, recvbuf), pieces(recvbuf, self.Get_size()))

    def Iallgatherv(self, sendbuf: object, recvbuf: object) -> TracedRequest:
        """Start to give every rank the pieces of all; recvbuf is `message.Pieces`."""
        return self._start("Iallgatherv", (sendbuf, recvbuf), pieces(recvbuf, self.Get_size()))

    def _pieces(self, name: str, sizes: Sequence[int], start: float, end: float = float("nan")) -> list[Event]:
        """Record what comes from each other rank in a collective."""
        found = arriving(sizes, self.Get_rank())
        events = [Event("receive", name, self.ranks[peer], size, start, end) for peer, size in found]
        self.trace.events += events
        return events

    def _collective(self, name: str, arguments: Sequence[object], sizes: Sequence[int]) -> None:
        """Call a collective in which so many bytes come from each rank."""
        start = message.clock()
        getattr(self.comm, name)(*arguments)
        end = message.clock()
        self._pieces(name, sizes, start, end)
        self.trace.events.append(Event("wait", name, -1, 0, start, end))

    def _start(self, name: str, arguments: Sequence[object], sizes: Sequence[int]) -> TracedRequest:
        """Start a collective in which so many bytes come from each rank."""
        events = self._pieces(name, sizes, message.clock())
        return self._request(getattr(self.comm, name)(*arguments), events)

    # Memory of a host

    def Allocate_shared(self, nbytes: int) -> TracedWindow:
        """Make a window of memory that the ranks of a host share; see `message.Allocate_shared`."""
        return TracedWindow(message.Allocate_shared(self.comm, nbytes), self.trace)

    # Agreement

    def Allgather(self, sendbuf: object, recvbuf: object) -> None:
        """Exchange what ranks must agree on."""
        self._agree(self.comm.Allgather, sendbuf, recvbuf)

    def allgather(self, value: T) -> list[T]:
        """Exchange what ranks must agree on."""
        values: list[T] = self._agree(self.comm.allgather, value)
        return values

    def bcast(self, value: object, root: int = 0) -> Any:
        """Tell all ranks what one knows."""
        return self._agree(self.comm.bcast, value, root)

    def Bcast(self, buf: object, root: int = 0) -> None:
        """Tell all ranks what one knows."""
        self._agree(self.comm.Bcast, buf, root)

    def _agree(self, call: Callable[..., Any], *arguments: object) -> Any:
        event = Event("agree", call.__name__, -1, 0, message.clock())
        self.trace.events.append(event)
        result = call(*arguments)
        event.end = message.clock()
        return result

    # What isn't recorded

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self.comm.Barrier()

    def Ibarrier(self) -> Request:
        """Start to wait for all ranks."""
        request: Request = self.comm.Ibarrier()
        return request

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        """Give the root the objects of all."""
        result: list[T] | None = self.comm.gather(value, root)
        return result
