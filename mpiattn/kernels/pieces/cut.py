"""Pieces that a block is cut into: rectangles that a library can do, whole ones or bounded by diagonals.

Blocks of the zigzag and striped layouts under a causal mask, and those of sliding windows, take one or two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.block import Block

MOST_PIECES = 16  # of a block; with more, such as many documents, each plan would be used too seldom
SQUARE = 128  # keys before a diagonal from which on they are a piece of their own, as cuDNN is faster at squares


class Piece(NamedTuple):
    """A rectangle of a block in which every query sees a run of keys of one of four forms.

    Attributes
    ----------
    queries, keys : slice
    causal : bool
        Each query sees one key more than the one before, and the last query the last key.
    left : int, optional
        Each query's run begins one key later than the one before's. Where `causal` too, runs have this many
        keys; else it is 1, and the first query sees the first key.
    block : Block
        This rectangle alone, for the plain kernel.
    """

    queries: slice
    keys: slice
    causal: bool
    left: int | None
    block: Block

    @classmethod
    def whole(cls, block: Block) -> Piece:
        """Return a block as one piece, which only the plain kernel can do."""
        queries, keys = slice(0, len(block.queries)), slice(0, len(block.keys))
        return cls(queries, keys, False, None, _part(block, queries, keys))


def pieces(
    start: NDArray[np.int32], stop: NDArray[np.int32], block: Block, square: int | None = SQUARE
) -> list[Piece] | None:
    """Cut a block into pieces that a library can do, or return None where they would be too many.

    Parameters
    ----------
    start, stop : int32, (queries,)
        Each query sees the keys of indices [start, stop).
    square : int, optional
        Keys before a diagonal from which on they are a piece of their own; None: never.
    """
    seeing = start < stop
    steps = np.stack([np.diff(start), np.diff(stop)])
    usual = np.isin(steps, (0, 1)).all(axis=0) & seeing[1:] & seeing[:-1]  # query i + 1 may follow i in a piece
    breaks = np.flatnonzero((np.diff(steps) != 0).any(axis=0)) + 1
    result: list[Piece] = []
    first = 0
    while first < len(start):
        last = first
        if first < len(usual) and usual[first]:
            ends = breaks[np.searchsorted(breaks, first, side="right") :]
            last = int(ends[0]) if len(ends) else len(usual)
            last = first + int(np.argmin(np.append(usual[first:last], False)))
        if seeing[first]:
            queries, keys = slice(first, last + 1), slice(int(start[first]), int(stop[last]))
            later, more = (last > first and bool(step[first]) for step in steps)
            left = (int(stop[first] - start[first]) if more else 1) if later else None
            before = keys.stop - keys.start - (queries.stop - queries.start)  # keys that the first query sees
            if more and left is None and square is not None and before >= square:
                seen = slice(keys.start, keys.start + before)
                result.append(Piece(queries, seen, False, None, _part(block, queries, seen)))
                keys = slice(seen.stop, keys.stop)
            result.append(Piece(queries, keys, more, left, _part(block, queries, keys)))
            if len(result) > MOST_PIECES:
                return None
        first = last + 1
    return result


def _part(block: Block, queries: slice, keys: slice) -> Block:
    """Return some of a block's queries against some of its keys; the arrays given with it are of these alone."""
    return Block(block.mask, block.queries[queries], block.keys[keys])
