"""Messages between GPUs: a communicator whose messages are posted when the device has come to them.

Work on a GPU is queued. A buffer is ready to be sent, or free to receive, once the device has done what was
queued before; to wait for that before a message would leave the device idle. So `DeviceComm` records an
event where the algorithm posts a message, lets the algorithm queue its next block, and hands the message to
MPI when the event has passed: in the `Testall` and `Waitall` that follow.

Where the MPI library takes device memory, which `takes_device_memory` finds out, it is given just that. Else
a message goes through the host's memory: see `staging.py`.

This module serves CuPy through the namespace that an array brings along; NumPy's arrays pass it untouched.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from . import staging
from .arrays import Tracked, Uses
from .message import Communicator, Memory, Testall, constant

Array = Any

MODES = ("auto", "device", "host")
LARGEST = 2**30  # bytes of one message of device memory; an MPI-3 library counts them in a C int
ROUNDS = 500  # messages of one tag to one rank are numbered modulo this
TAGS = 32  # tags of algorithms lie below
BACK = ROUNDS * TAGS  # added to the tag of a message: what its receiver says to its sender

FROM_LAUNCHER = ("PMI_", "PMIX_", "PRTE_", "OMPI_COMM_", "OMPI_UNIVERSE", "HYDI_", "HYDRA_", "SLURM_", "MPI_LOCAL")

PROBE = """
import cupy
from mpi4py import MPI
sent = cupy.arange(2**16).astype("u1")
got = cupy.zeros_like(sent)
cupy.cuda.Device().synchronize()
request = MPI.COMM_SELF.Irecv(got, 0)
MPI.COMM_SELF.Send(sent, 0)
request.Wait()
assert (sent == got).all()
"""


def check(mode: str) -> None:
    """Raise ValueError where there is no such way of messages."""
    if mode not in MODES:
        raise ValueError(f"unknown way of GPU messages {mode!r}: choose from {', '.join(MODES)}")


@cache
def survives_probe() -> bool:
    """Return whether a process of its own survives a message of device memory; a library that can't dies of it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FROM_LAUNCHER)}
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


found: list[bool] = []
"""What was found out about the MPI library, once it was."""


def takes_device_memory(comm: Communicator, xp: Any) -> bool:
    """Find out by messages whether the MPI library takes device memory; all ranks call it together.

    The first one is in a process of its own, on rank 0. The second goes to the next rank.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    answer = comm.bcast(found[0] if rank == 0 and found else None)
    if answer is None:
        answer = comm.bcast(survives_probe() if rank == 0 else None)
        if answer:
            numbers, source = xp.arange(2**20).astype(np.uint8), (rank - 1) % size
            sent, got = numbers + np.uint8(rank % 251), xp.zeros_like(numbers)
            xp.cuda.Device().synchronize()
            request = comm.Irecv(got, source, 0)
            comm.Send(sent, (rank + 1) % size, 0)
            request.Wait()
            answer = all(comm.allgather(bool((got == numbers + np.uint8(source % 251)).all())))
    found[:] = [answer]
    return bool(answer)


class Channel:
    """What the communicators of one algorithm share: how messages go, and those under way.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks make a channel together.
    xp : module
        CuPy.
    mode : {"auto", "device", "host"}
        Whether messages are of device memory, or go through the host's; "auto" finds out.
    """

    def __init__(self, comm: Communicator, xp: Any, mode: str = "auto") -> None:
        self.xp = xp
        self.on_device = mode == "device" or (mode == "auto" and takes_device_memory(comm, xp))
        self.under_way: list[Transfer] = []
        self.out, self.back = (xp.cuda.Stream(non_blocking=True) for _ in range(2))
        self.slots: list[Any] = []
        self.segment = None if self.on_device else staging.Segment.of(comm, xp)

    def mark(self, stream: Any = None) -> Any:
        """Return an event that passes when the device has done all that was queued so far."""
        event = self.xp.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def ready(self, buf: Any) -> Any:
        """Return an event that passes when the device has done with a buffer what was queued so far."""
        event = None
        if Uses.opened or not isinstance(buf, Tracked):
            event = self.mark()
        for uses in Uses.opened:
            uses.event = event
        Uses.opened.clear()
        return buf.uses.event if isinstance(buf, Tracked) else event

    def slot(self) -> Any:
        """Return a piece of pinned memory, bytes of the host."""
        if self.slots:
            return self.slots.pop()
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(staging.PIECE), np.uint8, staging.PIECE)

    def copy(self, to: int, source: int, size: int, stream: Any) -> Any:
        """Queue a copy between host and device; return the event of its end."""
        default = 4  # cudaMemcpyDefault: the pointers say which way
        self.xp.cuda.runtime.memcpyAsync(to, source, size, default, stream.ptr)
        return self.mark(stream)


class Transfer:
    """A message or a collective under way; `steps` brings it on, and yields while there is nothing to do."""

    def __init__(self, channel: Channel, steps: Iterator[None], buffer: Any = None) -> None:
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


class DeviceComm:
    """A communicator with mpi4py's methods that sends, receives and gathers device memory.

    Messages of NumPy arrays, and all other methods, are the communicator's own. Collectives on device memory
    are made of messages: MPI libraries differ in which ones they do there, and how fast.
    """

    def __init__(self, comm: Communicator, channel: Channel) -> None:
        self.comm, self.channel = comm, channel
        self.counts: dict[tuple[str, int, int], int] = defaultdict(int)
        self.names = [] if channel.on_device else comm.allgather(staging.name())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Transfer:
        """Start to send a buffer, once the device has filled it."""
        return self._start("send", self.comm.Isend, buf, dest, tag)

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> Transfer:
        """Start to receive into a buffer, once the device no longer needs it."""
        return self._start("receive", self.comm.Irecv, buf, source, tag)

    def _start(self, kind: str, post: Callable[..., Any], buf: Any, peer: int, tag: int) -> Transfer:
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
        if segment is not None and self.names[peer] in segment.parts:
            shared = staging.shared_send if kind == "send" else staging.shared_receive
            steps = shared(self.comm, self.channel, segment, self.names[peer], pieces, peer, tag, BACK, ready)
        else:
            staged = staging.send if kind == "send" else staging.receive
            steps = staged(self.comm, self.channel, pieces, peer, tag, ready)
        return Transfer(self.channel, steps, array)

    def _on_device(
        self, post: Callable[..., Any], pointer: int, size: int, peer: int, tag: int, ready: Any
    ) -> Iterator[None]:
        while not ready.done:
            yield
        edges = [*range(0, size, LARGEST), size]
        requests = [post(Memory(pointer + a, b - a), peer, tag) for a, b in itertools.pairwise(edges)]
        yield from _posted(requests)

    # Collectives

    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> Transfer:
        """Start to gather a piece of each rank on all ranks."""
        if isinstance(_array(recvbuf), np.ndarray):
            return Transfer(self.channel, _posted([self.comm.Iallgatherv(sendbuf, recvbuf)]))
        parts, rank = _parts(recvbuf), self.comm.Get_rank()
        if not (isinstance(sendbuf, (int, str)) or sendbuf is constant("IN_PLACE")):
            parts[rank][...] = _array(sendbuf).reshape(-1).view(np.uint8)
        return self._exchange([parts[rank]] * len(parts), parts)

    def Allgatherv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Gather a piece of each rank on all ranks."""
        Transfer.Waitall([self.Iallgatherv(sendbuf, recvbuf)])

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
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


def _array(buf: Any) -> Array:
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


def _posted(requests: Sequence[Any]) -> Iterator[None]:
    while not Testall(requests):
        yield


def _completed(transfers: Sequence[Transfer]) -> Iterator[None]:
    while not all(transfer.done for transfer in transfers):
        yield


def attach(attention: Any, xp: Any, mode: str = "auto") -> None:
    """Let the communicators of an algorithm carry device memory; all ranks call it together."""
    if hasattr(attention, "channel"):
        return
    comm = (
        attention.comm.comm if hasattr(attention.comm, "trace") else attention.comm
    )  # what it finds out is no traffic
    channel = attention.channel = Channel(comm, xp, mode)
    wrapped: dict[int, Any] = {}

    def wrap(comm: Any) -> Any:
        if hasattr(comm, "trace"):  # a TracedComm stays outermost, and sees each message once
            comm.comm = wrap(comm.comm)
            return comm
        if isinstance(comm, DeviceComm):
            return comm
        return wrapped.setdefault(id(comm), DeviceComm(comm, channel))

    for name, value in list(vars(attention).items()):
        if hasattr(value, "Isend") and hasattr(value, "Get_size"):
            setattr(attention, name, wrap(value))
