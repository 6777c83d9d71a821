"""Which keys each query sees, worked out anew from what each mask is documented to mean, pair by pair.

Nothing here asks a mask of the package for its bounds: the oracle would share them with what it judges.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problems.mask import Causal, Documents, Full, Intersection, Mask, Positions, SlidingWindow

Visible = NDArray[np.bool_]


def visible(mask: Mask | Visible, queries: Positions, keys: Positions) -> Visible:
    """Return which keys each query sees: bool, (queries, keys).

    Parameters
    ----------
    mask : Mask, or bool, (all queries, all keys)
        A mask of a user's own is asked for one query at a time, and what it says is compared in Python's integers.
    queries, keys : int64
        Positions.
    """
    if isinstance(mask, np.ndarray):
        return mask[np.ix_(queries, keys)]
    meaning = MEANINGS.get(type(mask))
    if meaning is None:
        return _asked(mask, queries, keys)
    return np.broadcast_to(meaning(mask, queries[:, None], keys[None]), (len(queries), len(keys)))


def _full(mask: Full, query: Positions, key: Positions) -> bool:
    return True


def _causal(mask: Causal, query: Positions, key: Positions) -> NDArray[np.bool_]:
    return key <= query


def _window(mask: SlidingWindow, query: Positions, key: Positions) -> NDArray[np.bool_]:
    behind = query - key
    return (behind <= mask.left) & (-behind <= mask.right)


def _documents(mask: Documents, query: Positions, key: Positions) -> NDArray[np.bool_]:
    document = np.array([number for number, length in enumerate(mask.lengths) for _ in range(length)], int)
    for positions in (query, key):
        if positions.max(initial=-1) >= len(document):
            raise ValueError(f"a token at {positions.max()} is in none of the documents of {len(document)} tokens")
    seen: NDArray[np.bool_] = document[query] == document[key]
    return seen


def _both(mask: Intersection, query: Positions, key: Positions) -> NDArray[np.bool_]:
    return visible(mask.first, query[:, 0], key[0]) & visible(mask.second, query[:, 0], key[0])


MEANINGS: dict[type, Callable[[Any, Positions, Positions], Any]] = {
    Full: _full,
    Causal: _causal,
    SlidingWindow: _window,
    Documents: _documents,
    Intersection: _both,
}
"""Of each class of masks: given a column of queries and a row of keys, whether the one sees the other."""


def _asked(mask: Mask, queries: Positions, keys: Positions) -> Visible:
    """Return what a user's mask says of one query after the other."""
    result = np.zeros((len(queries), len(keys)), bool)
    for row, query in zip(result, queries, strict=True):
        [lo], [hi] = mask.bounds(np.array([query]))
        row[:] = (keys >= operator.index(lo)) & (keys < operator.index(hi))
    return result
