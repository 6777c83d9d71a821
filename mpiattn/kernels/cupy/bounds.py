"""Which keys each query of a block sees, kept on the device for all calls with the same positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.mask import Mask, Positions

Array = Any


class Bounds(NamedTuple):
    """The run of keys [start, stop) that each query of a block sees, as indices; on the host and on the device."""

    positions: tuple[Positions, Positions]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    on_device: tuple[Array, Array, Array, Array]
    """start, stop and the positions."""


class BoundsOf:
    """The bounds of a mask in blocks; those of the last ones are kept."""

    KEPT = 1024

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.kept: dict[tuple[int, int], Bounds] = {}

    def __call__(self, q_positions: Positions, k_positions: Positions) -> Bounds:
        """Return the bounds of queries and keys at these positions."""
        key = id(q_positions), id(k_positions)  # `Bounds` holds both, so neither number is given to another array
        if key not in self.kept:
            if len(self.kept) == self.KEPT:
                self.kept.clear()
            lo, hi = self.mask.bounds(q_positions)
            start, stop = (np.searchsorted(k_positions, bound).astype(np.int32) for bound in (lo, hi))
            both = q_positions, k_positions
            start_there, stop_there, queries, keys = map(cupy.asarray, (start, stop, *both))
            self.kept[key] = Bounds(both, start, stop, (start_there, stop_there, queries, keys))
        return self.kept[key]
