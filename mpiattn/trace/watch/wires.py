"""Wires: pipes that tell a watch in which order the processes of the ranks have ended.

A launcher that loses a rank kills the others at once. It learns of the end as a socket is closed, or as the parent of
the process. Linux closes the files of a process that ends from the highest number down, before it tells the parent. So
a pipe with a higher number than any socket to the launcher hangs up before the launcher can know, and epoll keeps what
happens in order: the first rank to hang up was not killed for another one of this host.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import resource
import select
from pathlib import Path

ABOVE = 1000  # numbers of sockets that MPI opens later, as messages are sent; a table of so many takes 8 KiB


def hold(folder: Path, rank: int) -> int | None:
    """Hold the wire of this process, in a rank; return its number, None where the system has none such."""
    path = folder / f"{rank}.wire"
    try:
        os.mkfifo(path)
        low = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for reading as well: else it waits for a reader
        try:
            highest = max(map(int, os.listdir("/proc/self/fd")))
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, max(highest + 1, min(ABOVE, most - 1)))
        finally:
            os.close(low)
    except (AttributeError, OSError):
        path.unlink(missing_ok=True)  # that nobody holds it is no end
        return None


class Wires:
    """The wires of all ranks of a host, in its watch.

    Attributes
    ----------
    epoll : select.epoll, optional
        Readable when one hangs up.
    open : dict
        Rank at the other end of each that has not hung up.
    hung : list of int
        Ranks that have, in this order.
    """

    def __init__(self, folder: Path, ranks: list[int]) -> None:
        self.hung: list[int] = []
        self.open: dict[int, int] = {}
        self.epoll = select.epoll() if hasattr(select, "epoll") else None
        for rank in ranks:
            with contextlib.suppress(OSError):
                wire = os.open(folder / f"{rank}.wire", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self.open[wire] = rank
                if self.epoll:
                    self.epoll.register(wire, 0)  # a hang-up is told anyway

    def read(self) -> None:
        """Take in who has hung up since."""
        while self.epoll and (found := self.epoll.poll(0)):
            for wire, _ in found:
                self.epoll.unregister(wire)
                os.close(wire)
                self.hung.append(self.open.pop(wire))


@functools.cache
def in_order() -> bool:
    """Say whether this kernel closes the files of a process from the highest number down: it is tried."""
    try:
        (wait, go), (low, held), (high, held_too) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
    except OSError:  # no room for a process
        return False
    if child == 0:
        os.read(wait, 1)
        os._exit(0)
    os.close(held)
    os.close(held_too)
    with select.epoll() as epoll:
        epoll.register(low, 0)
        epoll.register(high, 0)
        os.write(go, b".")
        os.waitpid(child, 0)
        told = [each for each, _ in epoll.poll(0)]
    for each in (wait, go, low, high):
        os.close(each)
    return told == [high, low]
