"""The arrays of a tile: memory that is used again, tile after tile and block after block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Work:
    """Arrays by name; each lives until its name is asked for again."""

    def __init__(self) -> None:
        self.held: dict[str, Array] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Return an uninitialised array that lives until its name is asked for again."""
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.size < size or held.dtype != dtype:
            held = self.held[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def with_ones(self, name: str, rows: Array, dtype: np.dtype[np.generic]) -> Array:
        """Copy keys or values, (tokens, dim), to (tokens, dim + 1) with ones in the last column."""
        result = self.buffer(name, (rows.shape[0], rows.shape[1] + 1), dtype)
        result[:, :-1] = rows
        result[:, -1] = 1
        return result

    def query(self, rows: Array, factor: float, dtype: np.dtype[np.generic]) -> Array:
        """Copy queries, (heads, tokens, dim), to (dim + 1, tokens * heads), times a factor.

        The last row is the caller's to fill.
        """
        heads, tokens, dim = rows.shape
        result = self.buffer("query", (dim + 1, tokens * heads), dtype)
        np.multiply(rows.T, factor, out=result[:-1].reshape(dim, tokens, heads), dtype=dtype)
        return result

    def product(self, name: str, a: Array, b: Array) -> Array:
        """Return a @ b."""
        # A BLAS may load what lies beyond small arrays, and report that as invalid; its results are right.
        with np.errstate(invalid="ignore"):
            return np.matmul(a, b, out=self.buffer(name, (a.shape[0], b.shape[1]), a.dtype))
