"""Time of what all ranks do at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..messages.message import Communicator
from . import gpu


def timed(comm: Communicator, work: Callable[[], object], calls: int = 1, xp: ModuleType = np) -> float:
    """Return the seconds that a call takes on the slowest rank, until the device is done too; all start together."""
    gpu.wait(xp)
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    gpu.wait(xp)
    return float(max(comm.allgather((time.perf_counter() - start) / calls)))
