"""A block of the attention matrix: some queries against some keys, and what the mask leaves of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .mask import Mask, Positions
from .pairs import pairs

ALL = slice(None)


class Block:
    """Some queries against some keys; a kernel computes it in one call. Made once, when an algorithm plans.

    Parameters
    ----------
    mask : Mask
    queries, keys : int64, (queries,) and (keys,)
        Global positions, ascending.
    rows : slice
        Where the queries lie in the arrays of their chunk (q, out, lse, d_out, delta, d_q): all of them, unless the
        chunk is cut.
    pairs : int, optional
        How many pairs of a query and a key the mask leaves, where it is known already.

    Notes
    -----
    Two blocks are never equal, so that a kernel may keep by block what it has prepared for one.
    """

    __slots__ = ("_pairs", "_runs", "keys", "mask", "queries", "rows")

    def __init__(
        self, mask: Mask, queries: Positions, keys: Positions, rows: slice = ALL, pairs: int | None = None
    ) -> None:
        self.mask, self.queries, self.keys, self.rows = mask, queries, keys, rows
        self._pairs = pairs
        self._runs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The mask's verdict, (start, stop), each (queries,): query i sees keys[start[i]:stop[i]]."""
        if self._runs is None:
            lo, hi = self.mask.bounds(self.queries)
            self._runs = np.searchsorted(self.keys, lo), np.searchsorted(self.keys, hi)
        return self._runs

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that the mask leaves."""
        if self._pairs is None:
            self._pairs = pairs(self.mask, self.queries, self.keys)
        return self._pairs
