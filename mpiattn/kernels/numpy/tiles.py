"""Tiles of a block: those that the mask leaves, with the keys that each query sees in them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.block import Block

QUERIES, KEYS = 384, 512  # a tile: its scores (768 kB in float32) stay in the second-level cache
SIDE = 128  # keys in a tile at the mask's edge: narrow, so that little of it is masked


class Tile(NamedTuple):
    """Some keys, and those queries of a row of tiles that attend to any of them."""

    keys: slice
    queries: slice  # counted from the row's first query
    visible: NDArray[np.bool_] | None  # (keys, queries); None: every query sees every key


def plan(block: Block) -> list[tuple[slice, list[Tile]]]:
    """Return the rows of tiles that the mask leaves of a block: slices of queries, each with its tiles.

    A query sees the keys of indices [start, stop). The keys that a whole row sees make large tiles
    without a mask; those before and after, that some of its queries see, make narrow ones.
    """
    start, stop = block.runs
    # Rows end where the runs jump: between the two parts of a zigzag chunk, between documents.
    jump = np.maximum(np.diff(start), np.diff(stop))
    usual = np.median(jump) if len(jump) else 0
    cuts = np.flatnonzero(jump > usual + SIDE) + 1
    patterns: dict[tuple[int, bytes], NDArray[np.bool_]] = {}  # most masks look alike: the diagonal's
    result = []
    for begin, end in pairwise([0, *map(int, cuts), len(block.queries)]):
        for rows in _cut(begin, end, QUERIES):
            first, last = start[rows], stop[rows]
            some = first < last
            if not some.any():
                continue
            full = int(first.max()), int(last.min())
            if full[0] >= full[1]:
                full = int(last.max()), int(last.max())
            tiles = [Tile(keys, slice(0, len(first)), None) for keys in _cut(*full, KEYS)]
            sides = _cut(int(first[some].min()), full[0], SIDE) + _cut(full[1], int(last[some].max()), SIDE)
            for keys in sides:
                seeing = np.flatnonzero(some & (first < keys.stop) & (last > keys.start))
                if not len(seeing):
                    continue
                queries = slice(int(seeing[0]), int(seeing[-1]) + 1)
                size = keys.stop - keys.start
                runs = np.clip([first[queries] - keys.start, last[queries] - keys.start], 0, size)
                if (size, runs.tobytes()) not in patterns:
                    index = np.arange(size)[:, None]
                    patterns[size, runs.tobytes()] = (index >= runs[0]) & (index < runs[1])
                visible = patterns[size, runs.tobytes()]
                tiles.append(Tile(keys, queries, None if visible.all() else visible))
            result.append((rows, tiles))
    return result


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Cut [begin, end) into the fewest slices of at most `size`, about even, in steps of 16."""
    length, count = end - begin, -(-(end - begin) // size)
    ends = [min(-(-length * i // (16 * count)) * 16, length) for i in range(1, count + 1)]
    return [slice(begin + a, begin + b) for a, b in pairwise([0, *ends])]
