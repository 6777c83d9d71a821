"""Messages under way between GPUs, and what the communicators that post them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...problems.scalars import check_name
from ..message import Communicator
from ..parcel import Tracked, Uses
from . import pinned
from .probe import takes_device_memory


class CudaEvent(Protocol):
    """An event of CUDA."""

    def record(self, stream: CudaStream | None, /) -> None:
        """Let it pass when what is queued so far is done."""
        ...

    @property
    def done(self) -> bool:
        """Whether the device has come to it."""
        ...


class CudaStream(Protocol):
    """A stream of CUDA."""

    @property
    def ptr(self) -> int:
        """Its handle."""
        ...


MODES = ("auto", "device", "host")


def check_mode(gpu_messages: str) -> None:
    """Raise ValueError where there is no such way of messages."""
    check_name("way of GPU messages", gpu_messages, MODES)


class Channel:
    """State that the communicators of one algorithm share: the way of messages, and the messages under way.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks make a channel together.
    xp : module
        CuPy.
    mode : {"auto", "device", "host"}
        Whether messages are of device memory, or go through the host's; "auto" finds out.
    """

    def __init__(self, comm: Communicator, xp: ModuleType, mode: str = "auto") -> None:
        self.xp, self.mode = xp, mode
        self.opened: list[Uses] = []
        """Buffers on which work is queued since the last event was recorded."""
        self.on_device = mode == "device" or (mode == "auto" and takes_device_memory(comm, xp))
        self.under_way: list[Transfer] = []
        self.out, self.back = (xp.cuda.Stream(non_blocking=True) for _ in range(2))
        self.slots: list[NDArray[np.uint8]] = []
        self.segment = None if self.on_device else pinned.Segment.of(comm, xp)

    def mark(self, stream: CudaStream | None = None) -> CudaEvent:
        """Return an event that passes when the device has done all that was queued so far."""
        event: CudaEvent = self.xp.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def ready(self, buf: object) -> Any:
        """Return an event that passes when the device has done with a buffer what was queued so far."""
        event = None
        if self.opened or not isinstance(buf, Tracked):
            event = self.mark()
        for uses in self.opened:
            uses.event = event
        self.opened.clear()
        return buf.uses.event if isinstance(buf, Tracked) else event

    def slot(self) -> NDArray[np.uint8]:
        """Return a piece of pinned memory, bytes of the host."""
        if self.slots:
            return self.slots.pop()
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(pinned.PIECE), np.uint8, pinned.PIECE)

    def copy(self, to: int, source: int, size: int, stream: CudaStream) -> CudaEvent:
        """Queue a copy between host and device; return the event of its end."""
        default = 4  # cudaMemcpyDefault: the pointers say which way
        self.xp.cuda.runtime.memcpyAsync(to, source, size, default, stream.ptr)
        return self.mark(stream)


class Transfer:
    """A message or a collective under way; `steps` brings it on, and yields while there is nothing to do."""

    def __init__(self, channel: Channel, steps: Iterator[None], buffer: object = None) -> None:
        self.channel, self.steps = channel, steps
        self.buffer = buffer  # lives as long as the message
        self.done = False
        channel.under_way.append(self)
        self.advance()

    def advance(self) -> bool:
        """Do what can be done now; return whether all is."""
        if not self.done:
            try:
                next(self.steps)
            except StopIteration:
                self.done = True
                self.channel.under_way.remove(self)
        return self.done

    @staticmethod
    def Testall(requests: Sequence[Transfer]) -> bool:
        """Bring on all transfers under way; return whether these have completed."""
        for channel in {id(request.channel): request.channel for request in requests}.values():
            for transfer in list(channel.under_way):
                transfer.advance()
        return all(request.done for request in requests)

    @staticmethod
    def Waitall(requests: Sequence[Transfer]) -> None:
        """Bring on all transfers under way until these have completed."""
        while not Transfer.Testall(requests):
            pass
