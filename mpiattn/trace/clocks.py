"""The events of all ranks on one clock."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..messages import message
from ..messages.message import Communicator, Tag, Waitall
from .comm import TracedComm
from .events import Trace

ROUND_TRIPS = 20


def clock_offset(comm: Communicator) -> float:
    """Return the seconds to add to this rank's `message.clock` to get rank 0's; all ranks call it together.

    Rank 0 asks each rank for its time. The fastest of several round trips bounds the error: half its time
    (Cristian 1989, Probabilistic clock synchronization).
    """
    here, there = np.empty(1), np.empty(1)
    offset = 0.0
    if comm.Get_rank() == 0:
        for rank in range(1, comm.Get_size()):
            best = math.inf
            for _ in range(ROUND_TRIPS):
                start = message.clock()
                Waitall([comm.Isend(here, rank, Tag.CLOCK)])
                Waitall([comm.Irecv(there, rank, Tag.CLOCK)])
                end = message.clock()
                if end - start < best:
                    best, offset = end - start, (start + end) / 2 - float(there[0])
            Waitall([comm.Isend(np.array([offset]), rank, Tag.CLOCK)])
        return 0.0
    for _ in range(ROUND_TRIPS):
        Waitall([comm.Irecv(here, 0, Tag.CLOCK)])
        there[0] = message.clock()
        Waitall([comm.Isend(there, 0, Tag.CLOCK)])
    Waitall([comm.Irecv(here, 0, Tag.CLOCK)])
    return float(here[0])


def gather(comm: Communicator, trace: Trace) -> list[Trace] | None:
    """Return the traces of all ranks on rank 0's clock, from 0 on; None on the other ranks."""
    comm = comm.comm if isinstance(comm, TracedComm) else comm
    offset = clock_offset(comm)
    aligned = [replace(event, start=event.start + offset, end=event.end + offset) for event in trace.events]
    gathered = comm.gather(aligned)
    if gathered is None:
        return None
    zero = min((event.start for events in gathered for event in events), default=0.0)
    for event in (event for events in gathered for event in events):
        event.start, event.end = event.start - zero, event.end - zero
    return [Trace(events) for events in gathered]
