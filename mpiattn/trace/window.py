"""A window of shared memory that records how long its ranks wait for each other."""

from __future__ import annotations

from typing import Any

from ..messages import message
from ..messages.message import Window
from .events import Event, Trace


class TracedWindow:
    """A window of shared memory whose fences are recorded as waits; nothing is received."""

    def __init__(self, window: Window, trace: Trace) -> None:
        self.window, self.trace = window, trace

    def Shared_query(self, rank: int) -> tuple[Any, int]:
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
