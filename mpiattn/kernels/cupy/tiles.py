"""Tiles that a block is computed in, so that memory grows with the tokens and not with their square."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from .bounds import Bounds

QUERIES, KEYS = 2048, 4096  # the largest tile of one head
TILE_BYTES = 2**28  # of the scores of all heads of a tile


class HeadTile(NamedTuple):
    """Some heads of K/V, the queries of their groups, and keys that some of the queries see."""

    heads: slice
    queries: slice
    keys: slice


def tiles(bounds: Bounds, kv_heads: int, group: int, itemsize: int) -> Iterator[HeadTile]:
    """Yield the tiles that cover a block, leaving out what no query sees."""
    for queries in _cut(0, len(bounds.start), QUERIES):
        start, stop = bounds.start[queries], bounds.stop[queries]
        some = start < stop
        if some.any():
            for keys in _cut(int(start[some].min()), int(stop[some].max()), KEYS):
                size = (queries.stop - queries.start) * (keys.stop - keys.start) * group * itemsize
                for heads in _cut(0, kv_heads, max(TILE_BYTES // size, 1)):
                    yield HeadTile(heads, queries, keys)


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Cut [begin, end) into the fewest slices of at most `size`, as even as can be."""
    count = -(-(end - begin) // size)
    edges = [begin + (end - begin) * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]
