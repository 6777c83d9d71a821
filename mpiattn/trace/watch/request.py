"""Requests whose waits are recorded.

They are MPI's own, with a number: to test them costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mpi4py import MPI

from ...messages import message
from .record import Kind, Recorder

LOW = 2**64 - 1  # posts of a wait that a record has room for


class WatchedRequest(MPI.Request):
    """A request of MPI's."""

    __slots__ = ("post", "recorder")

    recorder: Recorder

    post: int
    """Number of the message, of all that this rank posts."""

    @classmethod
    def Waitall(cls, requests: Sequence[Any], statuses: Any = None) -> Literal[True]:
        """Wait for all."""
        begin(requests[0].recorder, requests)
        MPI.Request.Waitall(requests, statuses)
        requests[0].recorder.write(Kind.DONE, 0, 0, 0, 0, 0, 0)
        return True

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for this one."""
        begin(self.recorder, [self])
        MPI.Request.Wait(self, status)
        self.recorder.write(Kind.DONE, 0, 0, 0, 0, 0, 0)
        return True


class WatchedTransfer:
    """Stand-in for a request of MPI's, such as `device.channel.Transfer`."""

    def __init__(self, request: message.Request, recorder: Recorder, post: int) -> None:
        self.request, self.recorder, self.post = request, recorder, post

    @staticmethod
    def Waitall(requests: Sequence[WatchedTransfer]) -> None:
        """Wait for all."""
        begin(requests[0].recorder, requests)
        message.Waitall([request.request for request in requests])
        requests[0].recorder.write(Kind.DONE, 0, 0, 0, 0, 0, 0)

    @staticmethod
    def Testall(requests: Sequence[WatchedTransfer]) -> bool:
        """Let messages progress."""
        return message.Testall([request.request for request in requests])


def numbered(request: message.Request, recorder: Recorder, post: int) -> message.Request:
    """Return a request with the number of its message."""
    if not isinstance(request, MPI.Request):
        return WatchedTransfer(request, recorder, post)
    watched = WatchedRequest(request)
    watched.recorder, watched.post = recorder, post
    return watched


def begin(recorder: Recorder, requests: Sequence[Any]) -> None:
    """Record that a wait begins."""
    posts = [request.post for request in requests]
    first, bits = min(posts), 0
    for post in posts:
        bits |= 1 << post - first
    recorder.step = step = recorder.step + 1
    recorder.write(Kind.WAIT, 0, 0, step, 0, first, bits & LOW)
