"""Passes over arrays in memory: how fast they go, and what it takes to start one."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from ...arrays import accumulator
from ...arrays.operations import cast, of
from ...arrays.places import Places
from ...messages.message import Communicator
from ...messages.parcel import Parcel
from .rounds import median

SOME = 25
"""Times that passes are started one after the other."""


def copies(comm: Communicator, rounds: int, xp: ModuleType) -> float:
    """Return the bytes per second, read and written, of copies in memory, all ranks at once."""
    size = 2**23 if xp is np else 2**29
    source, target = xp.ones(size // 4, np.float32), xp.empty(size // 4, np.float32)
    return 2 * size / median(comm, rounds, lambda: xp.copyto(target, source), xp)


def launches(comm: Communicator, dtype: DTypeLike, head_dim: int, rounds: int, xp: ModuleType) -> float:
    """Return the seconds that it takes to start a pass over arrays: the mean of a gather, a copy, a sum, a rounding."""
    shape = 1, 1, 8, head_dim
    part, total = cast(xp.ones(shape, np.float32), dtype), xp.ones(shape, accumulator(dtype))
    places, parcel, on = (
        Places(np.array([0, 1, 6, 7])),
        Parcel([(shape, dtype)], xp.empty(part.nbytes, np.uint8)),
        of(xp),
    )

    def passes() -> None:
        for _ in range(SOME):
            on.take(part, places)
            parcel.pack(part)
            on.add(total, part)
            on.cast(total, dtype)

    return median(comm, rounds, passes, xp) / (4 * SOME)
