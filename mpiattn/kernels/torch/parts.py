"""A block in parts that torch's attention can compute: rectangles, triangles, and where neither will do, masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiattn.problems.block import Block

ROWS = 256
"""Queries of a part with a mask: the mask has a number for each of them and each key."""


class Part(NamedTuple):
    """Some queries of a block against some of its keys."""

    rows: slice
    keys: slice
    causal: bool = False  # query i sees keys 0 ... i of the part
    visible: NDArray[np.bool_] | None = None  # (queries, keys); None: all, unless causal


def parts(block: Block) -> list[Part]:
    """Return the parts that the mask leaves of a block; together they are all of its pairs, each once."""
    start, stop = (np.asarray(bound) for bound in block.runs)
    stop = np.maximum(start, stop)
    steps = np.stack([np.diff(start), np.diff(stop)])
    result, row, count = [], 0, len(start)
    regular = len(np.flatnonzero((np.diff(steps) != 0).any(axis=0))) <= count // 16 + 2
    while row < count:
        step = (0, 0) if row + 1 == count else (int(steps[0, row]), int(steps[1, row]))
        if regular and step in [(0, 0), (0, 1)]:
            same = (steps[:, row:] == np.array(step)[:, None]).all(axis=0)
            end = row + 1 + (int(np.argmin(same)) if not same.all() else len(same))
            first, last = int(start[row]), int(stop[row])
            if step == (0, 0):
                result.append(Part(slice(row, end), slice(first, last)))
            else:  # a triangle, and the rectangle before it; an empty first row has no corner
                corner = max(last - 1, first)
                lead = row + (last == first)
                result += [Part(slice(row, end), slice(first, corner))]
                result += [Part(slice(lead, end), slice(corner, int(stop[end - 1])), causal=True)]
        else:
            end = min(row + ROWS, count)
            keys = slice(int(start[row:end].min()), int(stop[row:end].max()))
            index = np.arange(keys.start, keys.stop)
            visible = (index >= start[row:end, None]) & (index < stop[row:end, None])
            result.append(Part(slice(row, end), keys, visible=visible))
        row = end
    return [part for part in result if part.keys.start < part.keys.stop and part.rows.start < part.rows.stop]
