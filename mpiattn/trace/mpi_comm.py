"""Communicators that record and are MPI's own: an ordinary mpi4py program runs on them as it is.

`MPI.Request.Waitall`, `MPI.Win.Create` and all else that asks for a communicator or a request of MPI takes them.
What they record beyond `comm.TracedComm` is every call in which the sizes of the buffers say how many bytes come
from whom. All other calls that move data are noted by name in `Trace.uncounted`; `mpi_calls` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mpi4py import MPI

from ..messages import message
from ..messages.private import PrivateComm
from .buffers import nbytes
from .comm import TracedComm
from .events import Event, label
from .mpi_calls import add_calls
from .mpi_request import TracedMPIRequest, amend
from .request import TracedRequest


@add_calls
class TracedIntracomm(TracedComm, MPI.Intracomm):  # type: ignore[misc]
    """A communicator of MPI that records what goes over it; see `comm.TracedComm`."""

    def __new__(cls, comm: MPI.Intracomm, *_: object, **__: object) -> TracedIntracomm:
        """Return an object that has the communicator's handle."""
        return MPI.Intracomm.__new__(cls, comm)

    def Free(self) -> None:
        """Free the communicator, unless it is kept with its owner."""
        if isinstance(self.comm, PrivateComm):
            return
        MPI.Intracomm.Free(self)
        self.comm = MPI.COMM_NULL

    def Revoke(self) -> None:
        """Revoke the communicator, and what goes with it where it is a private one."""
        self.comm.Revoke()

    def _derived(self, comm: Any) -> Any:
        """Trace a communicator of some of these ranks; no message is sent for it, as some may be gone by now."""
        if comm == MPI.COMM_NULL:
            return comm
        here, there = self.comm.Get_group(), comm.Get_group()
        ranks = there.Translate_ranks(range(there.size), here)
        here.Free()
        there.Free()
        return TracedComm(comm, self.trace, [self.ranks[rank] for rank in ranks])

    def _request(self, request: Any, events: Sequence[Event]) -> Any:
        kind = TracedMPIRequest if isinstance(request, MPI.Request) else TracedRequest
        return kind(request, events, self.trace)

    # Messages

    def Irecv(self, buf: object, source: int = MPI.ANY_SOURCE, tag: int = MPI.ANY_TAG) -> Any:
        """Start to receive into a buffer."""
        return self._post("receive", self.comm.Irecv, buf, source, tag)

    def Issend(self, buf: object, dest: int, tag: int = 0) -> Any:
        """Start to send a buffer to a rank that receives it."""
        return self._post("send", self.comm.Issend, buf, dest, tag)

    def Ibsend(self, buf: object, dest: int, tag: int = 0) -> Any:
        """Start to send a buffer by way of an attached one."""
        return self._post("send", self.comm.Ibsend, buf, dest, tag)

    def Irsend(self, buf: object, dest: int, tag: int = 0) -> Any:
        """Start to send a buffer to a rank that waits for it."""
        return self._post("send", self.comm.Irsend, buf, dest, tag)

    def _post(self, kind: str, call: Any, buf: object, peer: int, tag: int) -> Any:
        events = self._message(kind, buf, peer, tag)
        request = call(buf, peer, tag)
        if not isinstance(request, MPI.Request):  # of a communicator for device memory
            return TracedRequest(request, events, self.trace)
        return TracedMPIRequest(request, events, self.trace, self.ranks if kind == "receive" and events else None)

    def _message(self, kind: str, buf: object, peer: int, tag: int) -> list[Event]:
        """Record a message that is posted now; none where the other rank is PROC_NULL."""
        if peer == MPI.PROC_NULL:
            return []
        event = Event(kind, label(tag), self.ranks[peer] if peer >= 0 else -1, nbytes(buf), message.clock())
        self.trace.events.append(event)
        return [event]

    def Send(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send a buffer."""
        self._blocking(partial(self.comm.Send, buf, dest, tag), self._message("send", buf, dest, tag))

    def Ssend(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send a buffer, and wait until it is received."""
        self._blocking(partial(self.comm.Ssend, buf, dest, tag), self._message("send", buf, dest, tag))

    def Bsend(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send a buffer by way of an attached one."""
        self._blocking(partial(self.comm.Bsend, buf, dest, tag), self._message("send", buf, dest, tag))

    def Rsend(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send a buffer to a rank that waits for it."""
        self._blocking(partial(self.comm.Rsend, buf, dest, tag), self._message("send", buf, dest, tag))

    def Recv(
        self, buf: object, source: int = MPI.ANY_SOURCE, tag: int = MPI.ANY_TAG, status: MPI.Status | None = None
    ) -> None:
        """Receive into a buffer."""
        status = status or MPI.Status()
        events = self._message("receive", buf, source, tag)
        self._blocking(partial(self.comm.Recv, buf, source, tag, status), events, status)

    def Sendrecv(
        self, sendbuf: object, dest: int, sendtag: int = 0, recvbuf: object = None, source: int = MPI.ANY_SOURCE,
        recvtag: int = MPI.ANY_TAG, status: MPI.Status | None = None,
    ) -> None:  # fmt: skip
        """Send a buffer and receive into another one."""
        status = status or MPI.Status()
        events = self._message("send", sendbuf, dest, sendtag) + self._message("receive", recvbuf, source, recvtag)
        call = partial(self.comm.Sendrecv, sendbuf, dest, sendtag, recvbuf, source, recvtag, status)
        self._blocking(call, events, status)

    def Sendrecv_replace(
        self, buf: object, dest: int, sendtag: int = 0, source: int = MPI.ANY_SOURCE, recvtag: int = MPI.ANY_TAG,
        status: MPI.Status | None = None,
    ) -> None:  # fmt: skip
        """Send a buffer and receive into it."""
        status = status or MPI.Status()
        events = self._message("send", buf, dest, sendtag) + self._message("receive", buf, source, recvtag)
        self._blocking(partial(self.comm.Sendrecv_replace, buf, dest, sendtag, source, recvtag, status), events, status)

    def _blocking(self, call: Callable[[], None], events: Sequence[Event], status: MPI.Status | None = None) -> None:
        """Make a call that ends when its messages are complete; of a receive with its status."""
        start = message.clock()
        call()
        end = message.clock()
        for event in events:
            event.end = end
            if status is not None and event.kind == "receive":
                amend(event, status, self.ranks)
        self.trace.events.append(Event("wait", "", -1, 0, start, end))


class TracedCartcomm(TracedIntracomm, MPI.Cartcomm):  # type: ignore[misc]
    """A grid of MPI that records what goes over it."""


def traced_class(comm: MPI.Intracomm) -> type[TracedIntracomm]:
    """Return the class for a communicator."""
    return TracedCartcomm if isinstance(comm, MPI.Cartcomm) else TracedIntracomm
