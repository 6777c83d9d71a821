"""Several arrays in one buffer, as messages carry them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Spec
from ..arrays.operations import operations
from .message import Rows


class Uses:
    """Work of a GPU on a buffer that may not be done: all that was queued before `event` was recorded.

    Work on a buffer is queued right after its arrays are asked for. So each event that `device.channel.Channel.ready`
    records is the last one for all buffers that were opened since the event before it.

    Parameters
    ----------
    opened : list of Uses
        `Channel.opened`: the buffers that were opened since the last event.
    """

    def __init__(self, opened: list[Uses]) -> None:
        self.event: Any = None
        self.opened = opened
        self.open()  # the buffer's memory may have been another array's

    def open(self) -> None:
        """Note that work on the buffer is about to be queued."""
        if self not in self.opened:
            self.opened.append(self)


@dataclass(frozen=True)
class Tracked:
    """A buffer to send or receive, with the event after the GPU's last work on it."""

    buffer: Any
    uses: Uses

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return int(self.buffer.nbytes)


class Parcel:
    """Several arrays that travel in one message: views of one buffer of bytes, one after the other.

    Parameters
    ----------
    specs : sequence of (shape, dtype)
        The widest dtype comes first: then no bytes are lost to the alignment of the next one.
    buffer : uint8, at least the sum of the sizes, optional
        Storage to use; several parcels may take turns in it. A new NumPy array by default.
    uses : Uses, optional
        Of a buffer on a GPU; `arrays` is then to be asked for anew before each piece of work.
    """

    def __init__(
        self, specs: Sequence[Spec], buffer: NDArray[np.uint8] | None = None, uses: Uses | None = None
    ) -> None:
        *starts, end = _starts(specs)
        self.specs = list(specs)
        self.buffer = (np.empty(end, np.uint8) if buffer is None else buffer)[:end]
        self.uses = uses
        self.sent_as: Parcel | None = None
        """The parcel in which this one's numbers travel, rounded, if they do."""
        self.rounded = False
        """Whether `sent_as` holds the numbers already: a kernel may have put them nowhere else."""
        self.views: list[Array] = [
            self.buffer[start : start + nbytes([spec])].view(spec[1]).reshape(spec[0])
            for start, spec in zip(starts, specs, strict=True)
        ]

    @property
    def arrays(self) -> list[Array]:
        """The arrays."""
        if self.uses is not None:
            self.uses.open()
        return self.views

    @property
    def message(self) -> object:
        """The parcel as a buffer argument of a send or a receive; what travels rounded is rounded now."""
        if self.sent_as is None:
            return self._message
        if not self.rounded:
            self.sent_as.pack(*self.arrays)
        self.rounded = False
        return self.sent_as.message

    @functools.cached_property
    def _message(self) -> object:
        return Rows(self.buffer) if self.uses is None else Tracked(self.buffer, self.uses)

    def release(self) -> None:
        """Let go of the memory: the parcel is not used any more."""
        self.buffer, self.views = self.buffer[:0].copy(), []
        vars(self).pop("_message", None)

    def pack(self, *arrays: Array) -> None:
        """Copy arrays into the parcel."""
        for place, array in zip(self.arrays, arrays, strict=True):
            operations(array).copy(place, array)

    def add(self, other: Parcel) -> None:
        """Add the arrays of another parcel to this one's."""
        for place, array in zip(self.arrays, other.arrays, strict=True):
            operations(array).add(place, array)

    def fill(self, *values: float) -> None:
        """Set each array to one value."""
        for place, value in zip(self.arrays, values, strict=True):
            place.fill(value)


def nbytes(specs: Sequence[Spec]) -> int:
    """Return the bytes of arrays of these shapes and dtypes, one after the other."""
    return _starts(specs)[-1]


def _starts(specs: Sequence[Spec]) -> list[int]:
    """Return where each array starts, a multiple of its numbers' size, and where the last one ends."""
    starts, end = [], 0
    for shape, dtype in specs:
        size = int(np.dtype(dtype).itemsize)
        starts.append(-(-end // size) * size)
        end = starts[-1] + math.prod(shape) * size
    return [*starts, end]
