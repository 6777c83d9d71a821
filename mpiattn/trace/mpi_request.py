"""A request of MPI that records when it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mpi4py import MPI

from ..messages import message
from .events import Event, Trace, label

Requests = Sequence[MPI.Request]
Statuses = list[MPI.Status]


class TracedMPIRequest(MPI.Request):
    """A request of MPI whose own methods record its completion; those of `MPI.Request` take it, and record nothing.

    Parameters
    ----------
    request : MPI.Request
        Not to be used any more.
    events : sequence of Event
        Messages that are complete with it.
    trace : Trace
    ranks : sequence of int, optional
        Of a receive: the number in the trace of each rank that its status can name as the source.
    """

    def __new__(cls, request: MPI.Request, *_: object) -> TracedMPIRequest:
        """Return an object that has the request's handle."""
        return MPI.Request.__new__(cls, request)

    def __init__(
        self, request: MPI.Request, events: Sequence[Event], trace: Trace, ranks: Sequence[int] | None = None
    ) -> None:
        self.events, self.trace, self.ranks = events, trace, ranks
        self.source_unknown = ranks is not None and events[-1].peer < 0

    # One

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for it, and record how long that took."""
        start, status = message.clock(), status or MPI.Status()
        super().Wait(status)
        completed([self], [status], start)
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Let messages progress; record it if this one is complete."""
        status = status or MPI.Status()
        done = super().Test(status)
        if done:
            completed([self], [status])
        return done

    def wait(self, status: MPI.Status | None = None) -> Any:
        """Wait for it, and record how long that took."""
        self.Wait(status)

    def test(self, status: MPI.Status | None = None) -> tuple[bool, Any | None]:
        """Let messages progress; record it if this one is complete."""
        return self.Test(status), None

    # Several

    @classmethod
    def Waitall(cls, requests: Requests, statuses: Statuses | None = None) -> Literal[True]:
        """Wait for all, and record how long that took."""
        start, statuses = message.clock(), wanted(requests, statuses)
        MPI.Request.Waitall(requests, statuses)
        completed(requests, statuses, start)
        return True

    @classmethod
    def Testall(cls, requests: Requests, statuses: Statuses | None = None) -> bool:
        """Let messages progress; record it if all are complete."""
        statuses = wanted(requests, statuses)
        done = MPI.Request.Testall(requests, statuses)
        if done:
            completed(requests, statuses)
        return done

    @classmethod
    def Waitany(cls, requests: Requests, status: MPI.Status | None = None) -> int:
        """Wait for one of them, and record which, and how long that took."""
        start, status = message.clock(), status or MPI.Status()
        place = MPI.Request.Waitany(requests, status)
        if place != MPI.UNDEFINED:
            completed([requests[place]], [status], start)
        return place

    @classmethod
    def Testany(cls, requests: Requests, status: MPI.Status | None = None) -> tuple[int, bool]:
        """Let messages progress; record it if one is complete."""
        status = status or MPI.Status()
        place, done = MPI.Request.Testany(requests, status)
        if done and place != MPI.UNDEFINED:
            completed([requests[place]], [status])
        return place, done

    @classmethod
    def Waitsome(cls, requests: Requests, statuses: Statuses | None = None) -> list[int] | None:
        """Wait for some of them, and record which, and how long that took."""
        start, statuses = message.clock(), [] if statuses is None else statuses
        places = MPI.Request.Waitsome(requests, statuses)
        completed([requests[place] for place in places or ()], statuses, start)
        return places

    @classmethod
    def Testsome(cls, requests: Requests, statuses: Statuses | None = None) -> list[int] | None:
        """Let messages progress; record those that are complete."""
        statuses = [] if statuses is None else statuses
        places = MPI.Request.Testsome(requests, statuses)
        completed([requests[place] for place in places or ()], statuses)
        return places


def wanted(requests: Requests, statuses: Statuses | None) -> Statuses | None:
    """Return a list for the statuses of requests, where a receive takes from any rank, or one is given; else None."""
    if statuses is None:
        for request in requests:
            if getattr(request, "source_unknown", False):
                return []
    return statuses


def completed(requests: Requests, statuses: Statuses | None, start: float | None = None) -> None:
    """Record that requests are complete, from whom what has come, and a wait that began at `start`."""
    end, trace = message.clock(), None
    for place, request in enumerate(requests):
        if isinstance(request, TracedMPIRequest):
            trace = request.trace
            for event in request.events:
                if event.end != event.end:  # not a number yet: seen complete now
                    event.end = end
            if statuses and request.ranks is not None:
                amend(request.events[-1], statuses[place], request.ranks)
    if start is not None and trace is not None:
        trace.events.append(Event("wait", "", -1, 0, start, end))


def amend(event: Event, status: MPI.Status, ranks: Sequence[int]) -> None:
    """Put down from where how many bytes a receive has brought; its buffer may have had room for more."""
    if status.Is_cancelled():
        event.kind, event.nbytes = "cancelled", 0
    elif status.source >= 0:  # else it was complete before
        event.peer, event.nbytes = ranks[status.source], status.Get_count(MPI.BYTE)
        if event.name == label(MPI.ANY_TAG):
            event.name = label(status.tag)
