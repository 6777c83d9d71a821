"""Where an array lies in memory; this needs no CuPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

Array = Any

VECTOR = 16  # bytes of sums that a thread of a pass has at a time


class Place(NamedTuple):
    """Layout of an array in memory: its shape, strides in bytes, bytes of a number, whether it begins a vector."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool = True

    @classmethod
    def of(cls, array: Array) -> Place:
        """Return the layout of an array."""
        return cls(array.shape, array.strides, array.itemsize, array.data.ptr % VECTOR == 0)

    @classmethod
    def packed(cls, shape: Sequence[int], dtype: DTypeLike) -> Place:
        """Return the layout of a new array, contiguous."""
        size = np.dtype(dtype).itemsize
        return cls(tuple(shape), tuple(size * math.prod(shape[axis + 1 :]) for axis in range(len(shape))), size)

    @property
    def steps(self) -> list[int]:
        """Strides in numbers."""
        return [stride // self.itemsize for stride in self.strides]
