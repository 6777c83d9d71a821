"""The bytes of a message, from the buffer argument of its call, in every form that mpi4py takes.

    buffer    [buffer, datatype]    [buffer, count]    [buffer, count, datatype]    [buffer, count, start, datatype]

In place of the count may stand (count, start); in collectives with a piece of each rank these are lists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple


class BufferParts(NamedTuple):
    """A buffer argument taken apart; what it leaves out is None."""

    buffer: Any
    count: Any = None
    start: Any = None
    datatype: Any = None

    @classmethod
    def of(cls, argument: object, pair: tuple[type, ...]) -> BufferParts:
        """Take an argument apart; `pair` are the types in which count and start may come together."""
        if not isinstance(argument, (list, tuple)):
            return cls(argument)
        if len(argument) == 4:
            return cls(argument[0], argument[1], argument[2], argument[3])
        count: Any
        buffer, count, datatype = (*argument, None)[:3]
        if isinstance(count, str) or hasattr(count, "Get_extent"):
            count, datatype = None, count
        if type(count) in pair:
            return cls(buffer, count[0], count[1], datatype)
        return cls(buffer, count, None, datatype)

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of one element, and how far apart elements lie."""
        if self.datatype is None:
            size = int(getattr(self.buffer, "itemsize", 1))
            return size, size
        datatype = self.datatype
        if isinstance(datatype, str):
            datatype = sys.modules["mpi4py.MPI"].Datatype.fromcode(datatype)
        return int(datatype.Get_size()), int(datatype.Get_extent()[1])

    def elements(self) -> int:
        """Return how many elements the buffer has room for, behind its start."""
        if self.buffer is None:
            return 0
        if hasattr(self.buffer, "nbytes"):
            room = int(self.buffer.nbytes)
        elif isinstance(self.buffer, (bytes, bytearray)):
            room = len(self.buffer)
        else:
            room = int(sys.modules["mpi4py.MPI"].buffer(self.buffer).nbytes)
        _, extent = self.sizes()
        return room // extent - int(self.start or 0)


def nbytes(argument: Any) -> int:
    """Return the bytes of the buffer of a send or a receive."""
    try:
        return int(argument.nbytes)
    except AttributeError:  # an argument of several parts, or bytes
        parts = BufferParts.of(argument, (list, tuple))
    size, _ = parts.sizes()
    return size * (parts.elements() if parts.count is None else int(parts.count))


def even_pieces(argument: object, ranks: int) -> list[int]:
    """Return the bytes of each rank's piece, where all are equal; a count is that of one piece."""
    parts = BufferParts.of(argument, (list, tuple))
    size, _ = parts.sizes()
    return [size * (parts.elements() // ranks if parts.count is None else int(parts.count))] * ranks


def pieces(argument: object, ranks: int) -> list[int]:
    """Return the bytes of each rank's piece, where each has a count of its own."""
    parts = BufferParts.of(argument, (tuple,))
    size, _ = parts.sizes()
    if parts.count is None:
        each, more = divmod(parts.elements(), ranks)
        return [size * (each + (rank < more)) for rank in range(ranks)]
    counts = parts.count if hasattr(parts.count, "__len__") else [parts.count] * ranks
    return [size * int(count) for count in counts]


def arriving(sizes: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """Return (source, bytes) of each piece that comes from another rank and has anything in it."""
    return [(source, size) for source, size in enumerate(sizes) if size and source != rank]
