"""Tiles of a block: those that the mask leaves, with the keys that each query sees in them.

Heads that share keys share tiles: a tile's columns are the queries of some heads, token by token, the heads of each
side by side. So a tile has few tokens, of which the mask's edge cuts off little, and is large all the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.block import Block

QUERIES, KEYS = 384, 512  # a tile: its scores (768 kB in float32) stay in the second-level cache
TOGETHER = 4  # heads in a tile at most
SIDE = 128  # keys in a tile at the mask's edge: narrow, so that little of it is masked; of heads together half of it


Array = NDArray[Any]


class Tile(NamedTuple):
    """Some keys, and those queries of a row of tiles that attend to any of them."""

    keys: slice
    queries: slice  # columns, counted from the row's first
    visible: NDArray[np.bool_] | None  # (keys, columns); None: every query sees every key


Plan = tuple[int, list[tuple[slice, list[Tile]]]]
"""How many of a group of heads a tile has, and rows of tiles: each a slice of queries, with its tiles."""


def plan(block: Block, group: int = 1) -> Plan:
    """Return how many of a group of heads a tile has, and the rows of tiles that the mask leaves of a block.

    A query sees the keys of indices [start, stop). The keys that a whole row sees make large tiles
    without a mask; those before and after, that some of its queries see, make narrow ones.
    """
    together = max(count for count in range(1, TOGETHER + 1) if group % count == 0)
    side = SIDE if together == 1 else SIDE // 2  # a row of tiles has fewer tokens, and so a narrower edge
    start, stop = block.runs
    # Rows end where the runs jump: between the two parts of a zigzag chunk, between documents.
    jump = np.maximum(np.diff(start), np.diff(stop))
    usual = np.median(jump) if len(jump) else 0
    cuts = np.flatnonzero(jump > usual + SIDE) + 1
    patterns: dict[tuple[int, bytes], NDArray[np.bool_]] = {}  # most masks look alike: the diagonal's
    result = []
    for begin, end in pairwise([0, *map(int, cuts), len(block.queries)]):
        for rows in _cut(begin, end, QUERIES // together):
            first, last = start[rows], stop[rows]
            some = first < last
            if not some.any():
                continue
            full = int(first.max()), int(last.min())
            if full[0] >= full[1]:
                full = int(last.max()), int(last.max())
            tiles = [Tile(keys, slice(0, len(first) * together), None) for keys in _cut(*full, KEYS)]
            sides = _cut(int(first[some].min()), full[0], side) + _cut(full[1], int(last[some].max()), side)
            for keys in sides:
                seeing = np.flatnonzero(some & (first < keys.stop) & (last > keys.start))
                if not len(seeing):
                    continue
                queries = slice(int(seeing[0]), int(seeing[-1]) + 1)
                size = keys.stop - keys.start
                runs = np.clip([first[queries] - keys.start, last[queries] - keys.start], 0, size)
                if (size, runs.tobytes()) not in patterns:
                    index = np.arange(size)[:, None]
                    seen = (index >= runs[0]) & (index < runs[1])
                    patterns[size, runs.tobytes()] = seen.repeat(together, axis=1)
                visible = patterns[size, runs.tobytes()]
                columns = slice(queries.start * together, queries.stop * together)
                tiles.append(Tile(keys, columns, None if visible.all() else visible))
            result.append((rows, tiles))
    return together, result


def by_token(rows: Array) -> Array:
    """Return the rows of some heads, (heads, tokens, ...), as a tile has them: (tokens * heads, ...)."""
    result: Array = rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:])
    return result


def by_head(rows: Array, heads: int) -> Array:
    """Return the rows of a tile, (tokens * heads, ...), head by head: (heads, tokens, ...)."""
    result: Array = rows.reshape(-1, heads, *rows.shape[1:]).swapaxes(0, 1)
    return result


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Cut [begin, end) into the fewest slices of at most `size`, about even, in steps of 16."""
    length, count = end - begin, -(-(end - begin) // size)
    ends = [min(-(-length * i // (16 * count)) * 16, length) for i in range(1, count + 1)]
    return [slice(begin + a, begin + b) for a, b in pairwise([0, *ends])]
