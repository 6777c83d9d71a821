"""A request that records when it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..messages import message
from ..messages.message import Request
from .events import Event, Trace


class TracedRequest:
    """A request whose completion is recorded."""

    def __init__(self, request: Request, events: Sequence[Event], trace: Trace) -> None:
        self.request, self.events, self.trace = request, events, trace

    @staticmethod
    def Waitall(requests: Sequence[TracedRequest]) -> None:
        """Wait for all, and record how long that took."""
        start = message.clock()
        message.Waitall([request.request for request in requests])
        end = message.clock()
        complete(requests, end)
        requests[0].trace.events.append(Event("wait", "", -1, 0, start, end))

    @staticmethod
    def Testall(requests: Sequence[TracedRequest]) -> bool:
        """Let messages progress; record it if all are complete."""
        done = message.Testall([request.request for request in requests])
        if done:
            complete(requests, message.clock())
        return done


def complete(requests: Sequence[Any], end: float) -> None:
    """Record that requests are complete."""
    for event in (event for request in requests for event in request.events):
        if event.end != event.end:  # not a number yet: seen complete now
            event.end = end
