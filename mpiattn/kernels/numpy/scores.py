"""From a tile of scores to the weights of the softmax, in place. Scores are in units of log2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LOG2E = math.log2(math.e)
LN2 = math.log(2)

# All in log2. Scores below FLOOR from their row's shift count as FLOOR: far below rounding, and far above
# the denormal numbers, which cost a matrix product 100 times its time. (Keyed by bytes per number.)
FLOOR = {4: -64.0, 8: -128.0}
SAFE = 60.0  # scores within +-SAFE need no shift: 2**60 and its sums are well inside float32
SLACK = 16.0  # how far a score may exceed its row's shift before the shift is raised
FAR = 1e30  # shift of a query that attends to nothing: puts all its scores at FLOOR


def shift(score: Array, query: Array, total: Array, visible: Array | None) -> None:
    """Move the rows' shifts (query's last row, negated) so that no score exceeds its shift by much.

    The online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), except that a shift stays
    until a score exceeds it by SLACK: any shift near the maximum gives the same result.
    """
    if visible is not None:
        np.copyto(score, -np.inf, where=~visible)
    fresh = total[-1] == 0  # no keys so far: the shift means nothing yet and may move either way
    if score.max() <= SLACK and not fresh.any():
        return
    rise = score.max(axis=0)
    rise = np.where(fresh & ~np.isneginf(rise), rise, np.maximum(rise, 0))
    score -= rise
    query[-1] -= rise
    total *= np.exp2(-np.maximum(rise, 0))


def exp2(score: Array, visible: Array | None, bounded: bool = False) -> None:
    """Replace scores by their weights: exp2, and exactly zero where not visible."""
    if not bounded:
        floor = FLOOR[score.itemsize]
        if visible is not None:  # what is hidden may be anything; keep it from overflowing
            np.minimum(score, SAFE, out=score)
        if not score.min() >= floor:
            np.maximum(score, floor, out=score)
    np.exp2(score, out=score)
    if visible is not None:
        score *= visible


def longest(rows: Array) -> float:
    """Return the largest Euclidean norm of the rows, (tokens, dim)."""
    return math.sqrt(np.einsum("td,td->t", rows, rows).max(initial=0))
