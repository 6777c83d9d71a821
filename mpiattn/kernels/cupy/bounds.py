"""Bounds of the keys that each query of a block sees, kept on the device for all calls with the same block."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.block import Block

Array = Any


class Bounds(NamedTuple):
    """The run of keys [start, stop) that each query of a block sees, as indices; on the host and on the device."""

    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    on_device: tuple[Array, Array, Array, Array]
    """start, stop, and the positions of queries and keys."""


class BoundsOf:
    """The bounds of blocks; the bounds of the last blocks are kept."""

    KEPT = 1024

    def __init__(self) -> None:
        self.kept: dict[Block, Bounds] = {}

    def __call__(self, block: Block) -> Bounds:
        """Return the bounds of a block."""
        if block not in self.kept:
            if len(self.kept) == self.KEPT:
                self.kept.clear()
            start, stop = (bound.astype(np.int32) for bound in block.runs)
            on_device = cupy.asarray(start), cupy.asarray(stop), cupy.asarray(block.queries), cupy.asarray(block.keys)
            self.kept[block] = Bounds(start, stop, on_device)
        return self.kept[block]
