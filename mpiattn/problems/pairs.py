"""Numbers of pairs of a query and a key that a mask leaves: of one block, or of all blocks at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .mask import Mask, Positions


def pairs(mask: Mask, queries: Positions, keys: Positions) -> int:
    """Count the pairs of a block that the mask allows; keys ascend."""
    lo, hi = mask.bounds(queries)
    counts = np.searchsorted(keys, hi) - np.searchsorted(keys, lo)
    return int(np.maximum(counts, 0).sum())


def counts(mask: Mask, queries: Sequence[Positions], keys: Sequence[Positions]) -> NDArray[np.int64]:
    """Count the pairs of all blocks at once: int64, (query chunks, key chunks); what `pairs` counts of each.

    A query with bounds [lo, hi) sees min(hi, p) - min(lo, p) of the positions below p. Summed over a chunk's
    queries, that takes one search for each end of a run of consecutive keys. Where runs are short, as in a
    striped layout, adding up how many of the queries see each key is faster.
    """
    owner, start, stop = [], [], []
    for number, chunk in enumerate(keys):
        breaks = np.flatnonzero(np.diff(chunk, prepend=-2) != 1)
        owner.append(np.full(len(breaks), number))
        start.append(chunk[breaks])
        stop.append(chunk[np.append(breaks[1:], len(chunk))[: len(breaks)] - 1] + 1)
    runs, owners = np.concatenate(start + stop), np.concatenate(owner)
    result = np.zeros((len(queries), len(keys)), np.int64)
    last, long = int(runs.max(initial=0)), len(owners) <= 4 * len(keys)
    if not long:
        every, owners = np.concatenate(keys), np.repeat(np.arange(len(keys)), [len(chunk) for chunk in keys])
    for number, chunk in enumerate(queries):
        lo, hi = mask.bounds(chunk)
        hi = np.minimum(hi, last)
        lo = np.minimum(lo, hi)
        if long:
            begin, end = np.split(_below(hi, runs) - _below(lo, runs), 2)
            np.add.at(result[number], owners, end - begin)
        else:
            queries_on = np.cumsum(np.bincount(lo, minlength=last + 1) - np.bincount(hi, minlength=last + 1))
            result[number] = np.bincount(owners, queries_on[every], len(keys))
    return result


def _below(bounds: Positions, points: Positions) -> NDArray[np.int64]:
    """Return for each point the sum of min(bound, point) over bounds, which ascend."""
    place = np.searchsorted(bounds, points)
    result: NDArray[np.int64] = np.append(0, np.cumsum(bounds))[place] + (len(bounds) - place) * points
    return result
