"""Pinned memory of the host, which GPUs copy to and from, and which the ranks of a host share."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar

import numpy as np

from ..message import Allocate_shared, Communicator, constant

PIECE = 2**22  # bytes
SHARED = 8  # pieces that a rank has room for in memory that the ranks of its host share


class Segment:
    """Pinned memory that the ranks of a host share: each has some slots of PIECE bytes.

    Attributes
    ----------
    parts : dict
        Address of each rank's slots, by the name of the rank; see `name`.
    free : list of int
        Numbers of this rank's slots that hold nothing.
    """

    known: ClassVar[dict[tuple[str, ...], Segment | None]] = {}
    """Segments by the names of the ranks; they are kept until the process ends, as no rank knows when all have done."""

    def __init__(self, host: Communicator, names: Sequence[str], xp: ModuleType) -> None:
        self.window = Allocate_shared(host, SHARED * PIECE)
        buffers = [np.frombuffer(self.window.Shared_query(rank)[0], np.uint8) for rank in range(len(names))]
        buffers[host.Get_rank()].fill(0)  # its pages are taken from memory near this rank
        host.Barrier()
        self.parts = {part: buffer.ctypes.data for part, buffer in zip(names, buffers, strict=True)}
        self.free = list(range(SHARED))
        self.name = names[host.Get_rank()]
        for buffer in buffers:
            xp.cuda.runtime.hostRegister(buffer.ctypes.data, buffer.nbytes, 0)

    def address(self, part: str, slot: int) -> int:
        """Return the address of a slot of a rank."""
        return int(self.parts[part] + slot * PIECE)

    @classmethod
    def of(cls, comm: Communicator, xp: ModuleType) -> Segment | None:
        """Return the segment of this host's ranks of a communicator; None where memory can't be shared or pinned."""
        host = comm.Split_type(constant("COMM_TYPE_SHARED"))
        names = tuple(host.allgather(name()))
        if names not in cls.known:
            try:
                segment = cls(host, names, xp)
            except Exception:  # of MPI, or of CUDA
                segment = None
            cls.known[names] = segment if all(host.allgather(segment is not None)) else None
        host.Free()
        return cls.known[names]


def name() -> str:
    """Return a name that no other process has."""
    return f"{socket.gethostname()} {os.getpid()}"
