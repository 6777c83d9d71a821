"""Messages between GPUs through the host's memory, in pieces, so that copies and transfers overlap.

Between hosts a piece is copied to pinned memory, sent, and copied from there. Ranks of one host share pinned
memory: a piece is copied there by the sender's GPU and out by the receiver's, and MPI only says where it is.

Each function here is a generator that brings one message on, and yields while there is nothing to do. `channel`
is a `channel.Channel`; `ready` is an event that passes when the device has done with the buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..message import Communicator, Testall
from . import pinned
from .channel import Channel, CudaEvent
from .pinned import Segment

SLOTS = 4  # pieces of a message under way at a time
NOTHING = np.empty(0, np.uint8)

Pieces = deque[tuple[int, int]]
"""Address and size of each piece of a buffer on the device."""


def pieces(pointer: int, size: int) -> Pieces:
    """Return pointer and size of each piece of an array of bytes."""
    return deque((pointer + begin, min(pinned.PIECE, size - begin)) for begin in range(0, size, pinned.PIECE))


def send(comm: Communicator, channel: Channel, pieces: Pieces, dest: int, tag: int, ready: CudaEvent) -> Iterator[None]:
    """Copy pieces to the host, and send each as soon as it is there."""
    while not ready.done:  # waiting on the stream would hold up other messages
        yield
    copying, sending = deque[Any](), deque[Any]()
    while pieces or copying or sending:
        while pieces and len(copying) + len(sending) < SLOTS:
            pointer, size = pieces.popleft()
            slot = channel.slot()
            copying.append((channel.copy(slot.ctypes.data, pointer, size, channel.out), slot, size))
        while copying and copying[0][0].done:
            _, slot, size = copying.popleft()
            sending.append((comm.Isend(slot[:size], dest, tag), slot))
        while sending and sending[0][0].Test():
            channel.slots.append(sending.popleft()[1])
        yield


def receive(
    comm: Communicator, channel: Channel, pieces: Pieces, source: int, tag: int, ready: CudaEvent
) -> Iterator[None]:
    """Receive pieces on the host, and copy each to the device as soon as it is there."""
    receiving, copying = deque[Any](), deque[Any]()
    while pieces or receiving or copying:
        while pieces and len(receiving) + len(copying) < SLOTS:
            pointer, size = pieces.popleft()
            slot = channel.slot()
            receiving.append((comm.Irecv(slot[:size], source, tag), slot, pointer, size))
        while receiving and ready.done and receiving[0][0].Test():
            _, slot, pointer, size = receiving.popleft()
            copying.append((channel.copy(pointer, slot.ctypes.data, size, channel.back), slot))
        while copying and copying[0][0].done:
            channel.slots.append(copying.popleft()[1])
        yield


def shared_send(
    comm: Communicator, channel: Channel, segment: Segment, pieces: Pieces, dest: int, tag: int, back: int,
    ready: CudaEvent,
) -> Iterator[None]:  # fmt: skip
    """Copy pieces to own slots, once the receiver is there: so no slot waits for a message that comes later."""
    there = comm.Irecv(NOTHING, dest, tag + back)
    while not (ready.done and Testall([there])):
        yield
    copying, lent = deque[Any](), deque[Any]()
    while pieces or copying or lent:
        while pieces and segment.free and len(copying) + len(lent) < SLOTS:
            pointer, size = pieces.popleft()
            slot = segment.free.pop()
            copying.append((channel.copy(segment.address(segment.name, slot), pointer, size, channel.out), slot))
        while copying and copying[0][0].done:
            _, slot = copying.popleft()
            number = np.array([slot], np.int32)
            sent = comm.Isend(number, dest, tag)
            lent.append((comm.Irecv(NOTHING, dest, tag + back), sent, number, slot))
        while lent and lent[0][0].Test():
            _, sent, _, slot = lent.popleft()
            sent.Wait()
            segment.free.append(slot)
        yield


def shared_receive(
    comm: Communicator, channel: Channel, segment: Segment, part: str, pieces: Pieces, source: int, tag: int,
    back: int, ready: CudaEvent,
) -> Iterator[None]:  # fmt: skip
    """Copy pieces from the slots of the sender, whose name is `part`, and tell it that they are free again."""
    receiving, copying, told = deque[Any](), deque[Any](), [comm.Isend(NOTHING, source, tag + back)]
    while pieces or receiving or copying:
        while pieces and len(receiving) < SLOTS:
            slot = np.empty(1, np.int32)
            receiving.append((comm.Irecv(slot, source, tag), slot, *pieces.popleft()))
        while receiving and ready.done and receiving[0][0].Test():
            _, slot, pointer, size = receiving.popleft()
            copying.append(channel.copy(pointer, segment.address(part, int(slot[0])), size, channel.back))
        while copying and copying[0].done:
            copying.popleft()
            told.append(comm.Isend(NOTHING, source, tag + back))
        yield
    while not Testall(told):
        yield
