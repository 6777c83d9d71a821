"""A kernel that keeps a record of each block of compute, and passes all else on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..messages import message
from .events import Event, Trace


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
