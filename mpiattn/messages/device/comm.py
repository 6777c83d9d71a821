"""A communicator for arrays on GPUs, which posts each message when the device has come to it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..message import Memory, Request, Testall, constant
from ..parcel import Tracked
from . import pinned, staging
from .channel import Channel, CudaEvent, Transfer

if TYPE_CHECKING:
    from ..private import PrivateComm

Array = Any

LARGEST = 2**30  # bytes of one message of device memory; an MPI-3 library counts them in a C int
ROUNDS = 500  # messages of one tag to one rank are numbered modulo this
TAGS = 32  # tags of algorithms lie below
BACK = ROUNDS * TAGS  # added to the tag of a message: what its receiver says to its sender


class DeviceComm:
    """A communicator with mpi4py's methods that sends, receives and gathers device memory.

    Messages of NumPy arrays, and all other methods, are the communicator's own. Collectives on device memory
    are made of messages: MPI libraries differ in which ones they do there, and how fast.
    """

    def __init__(self, comm: Any, channel: Channel) -> None:
        self.comm, self.channel = comm, channel
        self.counts: dict[tuple[str, int, int], int] = defaultdict(int)
        self.names = [] if channel.on_device else comm.allgather(pinned.name())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def private(self) -> DeviceComm:
        """Return this communicator: what it carries for is private."""
        return self

    # Communicators made from this one carry device memory, too.

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = False) -> DeviceComm:
        """Make a Cartesian communicator."""
        return self._derived(self.comm.Create_cart(dims, periods, reorder))

    def Sub(self, remain_dims: Sequence[bool]) -> DeviceComm:
        """Make the communicator of a row or a column of a grid."""
        return self._derived(self.comm.Sub(remain_dims))

    def Split(self, color: int = 0, key: int = 0) -> DeviceComm:
        """Make a communicator of the ranks that give one color, in the order of their keys."""
        return self._derived(self.comm.Split(color, key))

    def _derived(self, comm: PrivateComm) -> DeviceComm:
        """Return the carrier of a communicator: one, as it numbers its messages."""
        carriers = comm.kept.carriers
        if self.channel.mode not in carriers:
            carriers[self.channel.mode] = DeviceComm(comm, self.channel)
        return carriers[self.channel.mode]  # type: ignore[no-any-return]

    # Messages

    def Isend(self, buf: object, dest: int, tag: int = 0) -> Transfer:
        """Start to send a buffer, once the device has filled it."""
        return self._start("send", self.comm.Isend, buf, dest, tag)

    def Irecv(self, buf: object, source: int, tag: int = 0) -> Transfer:
        """Start to receive into a buffer, once the device no longer needs it."""
        return self._start("receive", self.comm.Irecv, buf, source, tag)

    def _start(self, kind: str, post: Callable[..., Request], buf: object, peer: int, tag: int) -> Transfer:
        array = _array(buf)
        if isinstance(array, np.ndarray):
            return Transfer(self.channel, _posted([post(buf, peer, tag)]))
        # Numbered, as messages need not be posted in the order in which the algorithm posts them.
        number = self.counts[kind, peer, tag]
        self.counts[kind, peer, tag] += 1
        tag += number % ROUNDS * TAGS
        pointer, size, ready = int(array.data.ptr), int(array.nbytes), self.channel.ready(buf)
        if self.channel.on_device:
            return Transfer(self.channel, self._on_device(post, pointer, size, peer, tag, ready), array)
        segment, pieces = self.channel.segment, staging.pieces(pointer, size)
        name = self.names[peer]
        if segment is None or name not in segment.parts:
            staged = staging.send if kind == "send" else staging.receive
            steps = staged(self.comm, self.channel, pieces, peer, tag, ready)
        elif kind == "send":
            steps = staging.shared_send(self.comm, self.channel, segment, pieces, peer, tag, BACK, ready)
        else:
            steps = staging.shared_receive(self.comm, self.channel, segment, name, pieces, peer, tag, BACK, ready)
        return Transfer(self.channel, steps, array)

    def _on_device(
        self, post: Callable[..., Request], pointer: int, size: int, peer: int, tag: int, ready: CudaEvent
    ) -> Iterator[None]:
        while not ready.done:
            yield
        edges = [*range(0, size, LARGEST), size]
        requests = [post(Memory(pointer + a, b - a), peer, tag) for a, b in itertools.pairwise(edges)]
        yield from _posted(requests)

    # Collectives

    def Iallgatherv(self, sendbuf: object, recvbuf: object) -> Transfer:
        """Start to gather a piece of each rank on all ranks."""
        if isinstance(_array(recvbuf), np.ndarray):
            return Transfer(self.channel, _posted([self.comm.Iallgatherv(sendbuf, recvbuf)]))
        parts, rank = _parts(recvbuf), self.comm.Get_rank()
        if not (isinstance(sendbuf, (int, str)) or sendbuf is constant("IN_PLACE")):
            parts[rank][...] = _array(sendbuf).reshape(-1).view(np.uint8)
        return self._exchange([parts[rank]] * len(parts), parts)

    def Allgatherv(self, sendbuf: object, recvbuf: object) -> None:
        """Gather a piece of each rank on all ranks."""
        Transfer.Waitall([self.Iallgatherv(sendbuf, recvbuf)])

    def Alltoallv(self, sendbuf: object, recvbuf: object) -> None:
        """Send each rank its piece, and receive one from each."""
        if isinstance(_array(recvbuf), np.ndarray):
            self.comm.Alltoallv(sendbuf, recvbuf)
            return
        sent, received, rank = _parts(sendbuf), _parts(recvbuf), self.comm.Get_rank()
        received[rank][...] = sent[rank]
        Transfer.Waitall([self._exchange(sent, received)])

    def _exchange(self, sent: Sequence[Array], received: Sequence[Array]) -> Transfer:
        """Start to send a piece to each other rank, and to receive one from each, where there is anything in it."""
        others = [other for other in range(len(sent)) if other != self.comm.Get_rank()]
        transfers = [self.Irecv(received[other], other, TAGS - 1) for other in others if received[other].size]
        transfers += [self.Isend(sent[other], other, TAGS - 1) for other in others if sent[other].size]
        return Transfer(self.channel, _completed(transfers))


def carrier(comm: PrivateComm, xp: ModuleType, mode: str) -> tuple[DeviceComm, Channel]:
    """Return what carries device memory over a private communicator, and its channel; kept with it once made."""
    carriers = comm.kept.carriers
    if mode not in carriers:
        carriers[mode] = DeviceComm(comm, Channel(comm, xp, mode))
    return carriers[mode], carriers[mode].channel


def _array(buf: object) -> Array:
    """Return the array of a buffer argument of a message."""
    if isinstance(buf, Tracked):
        return buf.buffer
    return buf[0] if isinstance(buf, (list, tuple)) else buf


def _parts(buf: Any) -> list[Array]:
    """Return each rank's piece of a buffer as `message.Pieces` describes it."""
    buffer, counts, starts, unit = buf
    width = 1 if unit is None else unit.Get_size()
    starts = [0, *itertools.accumulate(counts)] if starts is None else starts
    data = buffer.reshape(-1).view(np.uint8)
    return [data[start * width : (start + n) * width] for start, n in zip(starts, counts, strict=False)]


def _posted(requests: Sequence[Request]) -> Iterator[None]:
    while not Testall(requests):
        yield


def _completed(transfers: Sequence[Transfer]) -> Iterator[None]:
    while not all(transfer.done for transfer in transfers):
        yield
