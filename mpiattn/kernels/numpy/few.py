"""A few queries that all see all keys of a block, as a new token's do in a cache.

Tiles would cost more to prepare than they save. The scores of all heads that share keys are one product, and keys and
values are read where they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiattn.arrays import accumulator
from mpiattn.arrays.softmax import merge
from mpiattn.problems.block import Block

from .scores import FLOOR, LARGE, LN2, LOG2E

Array = NDArray[Any]

QUERIES, KEYS = 4, 64
"""So many queries at most, so many keys at least."""


def fits(q: Array, block: Block) -> bool:
    """Say whether this is such a block, of a dtype that is computed in as it is."""
    queries, keys = len(block.queries), len(block.keys)
    return 0 < queries <= QUERIES and keys >= KEYS and q.dtype == accumulator(q.dtype) and block.pairs == queries * keys


def attend(q: Array, k: Array, v: Array, scale: float, out: Array, lse: Array) -> bool:
    """Merge the attention of q to all keys into (out, lse), in place.

    Return False, with nothing done, where a score is too large for its dtype, see `scores.LARGE`, or is none.

    Parameters
    ----------
    q : (batch, heads, queries, head_dim)
    k, v : (batch, kv_heads, keys, head_dim or v_head_dim)
    scale : float
        Of the scores.
    out, lse
        See `contract.Kernel.forward`.
    """
    b, heads, t, dim = q.shape
    rows = (q * (scale * LOG2E)).reshape(b, k.shape[1], heads // k.shape[1] * t, dim)
    by_keys = k @ rows.swapaxes(2, 3)  # the few rows behind: a BLAS takes a third of the time of rows @ k^T
    score = np.ascontiguousarray(by_keys.swapaxes(2, 3))  # (b, kv_heads, rows, keys), in log2
    top = score.max(axis=3, keepdims=True)
    least = score.min()
    if not max(float(top.max()), -float(least)) <= LARGE[score.itemsize] * LOG2E:  # NaN is not
        return False
    score -= top
    if not score.min() >= FLOOR[score.itemsize]:
        np.maximum(score, FLOOR[score.itemsize], out=score)
    np.exp2(score, out=score)
    total = score.sum(axis=3, keepdims=True)
    part = score @ v
    part /= total
    part_lse = LN2 * (np.log2(total, dtype=np.float64) + top)
    merge(out, lse, part.reshape(out.shape), part_lse.reshape(lse.shape))
    return True
