"""The collectives of a virtual communicator, and what each takes.

They take the time of the usual algorithms: binomial trees for latency, rings or pairwise exchange for bytes
(Thakur, Rabenseifner and Gropp 2005), over the slowest link of the group, on which all ranks of a node are taken
to be busy at once. All that a call does is done by the rank that comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from .clock import Rank
from .group import Group, Meeting
from .messages import VirtualRequest, copy

T = TypeVar("T")


class Collectives:
    """Collectives of `comm.VirtualComm`, which all ranks of a group call together."""

    def __init__(self, group: Group, rank: Rank) -> None:
        self.group, self.me = group, rank
        self.place = group.place[rank.number]
        self.calls = 0

    def Get_size(self) -> int:
        """Return the number of ranks."""
        return len(self.group.ranks)

    def Get_rank(self) -> int:
        """Return this rank."""
        return self.place

    def _meet(self, name: str, value: object, finish: Callable[[Meeting], float]) -> tuple[VirtualRequest, Meeting]:
        """Bring a value to a collective call; the last rank to come finishes it and says how long it takes."""
        self.calls += 1
        meeting = self.group.meetings.setdefault(self.calls, Meeting(name, self.Get_size()))
        if meeting.name != name:
            raise RuntimeError(f"rank {self.place} calls {name}, where others have called {meeting.name}")
        request = VirtualRequest(self.me)
        meeting.values[self.place] = value
        meeting.requests.append(request)
        if len(meeting.requests) == self.Get_size():
            del self.group.meetings[self.calls]
            done = max(other.posted for other in meeting.requests) + finish(meeting)
            for other in meeting.requests:
                other.complete(done)
        return request, meeting

    def _tell(self, name: str, value: object) -> list[Any]:
        """Bring an object that takes no time but latency; return the objects of all ranks."""
        request, meeting = self._meet(name, value, lambda _: self.group.seconds(self.group.depth, 0))
        request.Wait()
        return meeting.values

    # Objects

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self._tell("Barrier", None)

    def Ibarrier(self) -> VirtualRequest:
        """Start to wait for all ranks."""
        return self._meet("Barrier", None, lambda _: self.group.seconds(self.group.depth, 0))[0]

    def allgather(self, value: T) -> list[T]:
        """Give every rank the objects of all."""
        return list(self._tell("allgather", value))

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        """Give the root the objects of all."""
        values = self._tell("gather", value)
        return list(values) if self.place == root else None

    def bcast(self, value: object, root: int = 0) -> Any:
        """Give every rank the root's object."""
        return self._tell("bcast", value)[root]

    # Buffers

    def Bcast(self, buf: Array, root: int = 0) -> None:
        """Copy the root's buffer to every rank."""

        def finish(meeting: Meeting) -> float:
            for other in meeting.values:
                if other is not meeting.values[root]:
                    copy(meeting.values[root], other)
            return self.group.seconds(self.group.depth, 2 * buf.nbytes)

        self._meet("Bcast", buf, finish)[0].Wait()

    def Allgather(self, sendbuf: Array, recvbuf: Array) -> None:
        """Give every rank the buffers of all, one after the other."""
        copy(self._gathered(sendbuf), recvbuf)

    def rows(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of all ranks, one array for all of them to read; see `connection.rows`."""
        table: NDArray[np.int64] = self._gathered(row).reshape(self.Get_size(), -1)
        return table

    def _gathered(self, sendbuf: Array) -> Any:
        """Return the buffers of all ranks, one after the other."""

        def finish(meeting: Meeting) -> float:
            if isinstance(sendbuf, np.ndarray):
                meeting.result = np.concatenate([np.ravel(value) for value in meeting.values])
                meeting.result.flags.writeable = False
            return self.group.seconds(self.group.depth, (self.Get_size() - 1) * sendbuf.nbytes)

        request, meeting = self._meet("Allgather", sendbuf, finish)
        request.Wait()
        return meeting.result

    def Allgatherv(self, sendbuf: object, recvbuf: Sequence[Any]) -> None:
        """Give every rank the pieces of all; recvbuf is `message.Pieces`."""
        self.Iallgatherv(sendbuf, recvbuf).Wait()

    def Iallgatherv(self, sendbuf: object, recvbuf: Sequence[Any]) -> VirtualRequest:
        """Start to give every rank the pieces of all."""

        def finish(meeting: Meeting) -> float:
            for source, (sent, kept) in enumerate(meeting.values):
                buffer, pieces = kept
                own = buffer[pieces[source]] if not hasattr(sent, "shape") else sent
                for place, (_, (target, where)) in enumerate(meeting.values):
                    if place != source or own is sent:
                        copy(own, target[where[source]])
            return self.group.seconds(self.group.depth, self._receive(meeting))

        return self._meet("Allgatherv", (sendbuf, _pieces(recvbuf)), finish)[0]

    def Alltoallv(self, sendbuf: Sequence[Any], recvbuf: Sequence[Any]) -> None:
        """Give each rank its piece of every other's; both are `message.Pieces`."""

        def finish(meeting: Meeting) -> float:
            for dest, (_, (target, where)) in enumerate(meeting.values):
                for source, ((buffer, pieces), _) in enumerate(meeting.values):
                    copy(buffer[pieces[dest]], target[where[source]])
            return self.group.seconds(self.group.depth, self._receive(meeting), pairwise=True)

        self._meet("Alltoallv", (_pieces(sendbuf), _pieces(recvbuf)), finish)[0].Wait()

    def _receive(self, meeting: Meeting) -> int:
        """Count the pieces that each rank receives from others; return the bytes of the one with the most."""
        most = 0
        for place, (rank, (_, (_, pieces))) in enumerate(zip(self.group.ranks, meeting.values, strict=True)):
            nbytes = sum(piece.stop - piece.start for source, piece in enumerate(pieces) if source != place)
            rank.received += nbytes
            most = max(most, nbytes)
        return most

    # Memory

    def Allocate_shared(self, nbytes: int) -> VirtualWindow:
        """Make a window of memory that all ranks see."""
        request, meeting = self._meet("Allocate_shared", np.empty(nbytes, np.uint8), lambda _: 0.0)
        request.Wait()
        return VirtualWindow(self, meeting.values)


class VirtualWindow:
    """Memory that the ranks of a virtual host share."""

    def __init__(self, comm: Collectives, parts: list[NDArray[np.uint8]]) -> None:
        self.comm, self.parts = comm, parts

    def Shared_query(self, rank: int) -> tuple[NDArray[np.uint8], int]:
        """Return a rank's part, and the size of its unit."""
        return self.parts[rank], 1

    def Fence(self) -> None:
        """Wait until all ranks see what all have written."""
        self.comm.Barrier()

    def Free(self) -> None:
        """Do nothing."""


def _pieces(described: Sequence[Any]) -> tuple[Array, list[slice]]:
    """Return the buffer of `message.Pieces` as bytes, and where each rank's piece lies."""
    buffer, counts, starts, datatype = described
    unit = datatype.Get_size() if datatype else buffer.dtype.itemsize
    if starts is None:
        starts = [sum(counts[:place]) for place in range(len(counts))]
    slices = [slice(start * unit, (start + count) * unit) for start, count in zip(starts, counts, strict=True)]
    return buffer.reshape(-1).view(np.uint8), slices
