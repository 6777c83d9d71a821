"""The ways of chunks round a ring: no further than to the last rank whose queries or keys the mask gives them.

All is counted in hops: at hop 0 a chunk is at its owner, at hop h at the h-th rank after it. Behind a chunk goes a sum,
to which each rank that uses the chunk adds its part:

    hop            0       1       2       3       4          the mask lets the ranks at hops 2 and 3 use the chunk:
    chunk        owner --> . ----> uses -> uses    .          first = 2, last = 3
    its sum                        begins  joins              from hop 3 the sum goes home, to its owner
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Travel:
    """The way of a chunk round its ring.

    Attributes
    ----------
    first, last : int
        Hops to its first user and to its last one, the owner left out; 1 and 0 where nobody uses it.
    """

    first: int
    last: int

    @property
    def leaves(self) -> bool:
        """Whether the chunk leaves its owner, whose sum then comes home."""
        return self.last > 0

    def reaches(self, hop: int) -> bool:
        """Whether the chunk makes this hop: its last user is there, or beyond."""
        return 0 < hop <= self.last

    def summed(self, hop: int) -> bool:
        """Whether the rank at this hop has a sum for the chunk, which it sends on, or home if it is the last user."""
        return self.first <= hop <= self.last

    def joined(self, hop: int) -> bool:
        """Whether a sum arrives at this hop, from the ranks before, which the rank there adds to."""
        return self.first < hop <= self.last

    def ends(self, hop: int) -> bool:
        """Whether the last user is at this hop: from there the sum goes home."""
        return self.last == hop


def travels(users: NDArray[np.bool_], start: int = 1) -> list[Travel]:
    """Return how far each chunk of a ring travels.

    Parameters
    ----------
    users : bool, (owners, places)
        Whether the rank at a place of the ring uses the chunk of an owner.
    start : int
        The first hop that counts: 0 where a chunk begins at another rank than its owner, as in a double ring.
    """
    return _travels(users.astype(bool).tobytes(), len(users), start)


@functools.lru_cache(maxsize=64)
def _travels(table: bytes, n: int, start: int) -> list[Travel]:
    users = np.frombuffer(table, bool).reshape(n, n)
    places = np.add.outer(np.arange(n), np.arange(start, n)) % max(n, 1)
    uses = np.take_along_axis(users, places, axis=1)
    result = []
    for row in uses:
        hops = np.flatnonzero(row) + start
        result.append(Travel(int(hops[0]), int(hops[-1])) if len(hops) else Travel(1, 0))
    return result


def windows(
    needed: NDArray[np.bool_], rows: Sequence[Sequence[int]]
) -> tuple[dict[int, Travel], list[dict[int, Travel]]]:
    """Return how far each chunk travels in a double ring: along its column, and in each window along a row.

    Parameters
    ----------
    needed : bool, (query chunks, key chunks)
    rows : the ranks of each row of the grid
        In window w, row r has the chunks of row r - w.
    """
    return _windows(needed.astype(bool).tobytes(), tuple(map(tuple, rows)))


@functools.lru_cache(maxsize=4)
def _windows(table: bytes, rows: tuple[tuple[int, ...], ...]) -> tuple[dict[int, Travel], list[dict[int, Travel]]]:
    needed = np.frombuffer(table, bool).reshape(2 * [sum(map(len, rows))])
    along_col: dict[int, Travel] = {}
    along_row: list[dict[int, Travel]] = []
    for column in zip(*rows, strict=True):
        users = [[needed[list(row), owner].any() for row in rows] for owner in column]
        along_col.update(zip(column, travels(np.array(users)), strict=True))
    for window in range(len(rows)):
        ways: dict[int, Travel] = {}
        for r, owners in enumerate(rows):
            users = needed[np.ix_(rows[(r + window) % len(rows)], owners)].T
            ways.update(zip(owners, travels(users, start=0 if window else 1), strict=True))
        along_row.append(ways)
    return along_col, along_row
