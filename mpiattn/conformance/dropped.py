"""Which probabilities dropout keeps, worked out anew from its definition in `problems.dropout`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

LOW = np.uint64(0xFFFFFFFF)


def kept(
    rate: float, seed: int, batch: int, head: int, queries: NDArray[np.int64], keys: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which probabilities of a head are kept: bool, (queries, keys)."""
    fours, where = np.unique(keys >> 2, return_inverse=True)  # a counter's four words are those of four keys
    x0, x1 = (numbers.astype(np.uint64) & LOW for numbers in (fours[None], queries[:, None]))
    words = random123(x0, x1, np.uint64(head), np.uint64(batch), seed & 0xFFFFFFFF, seed >> 32)
    drawn = np.stack(np.broadcast_arrays(*words), axis=2)[:, where, keys & 3]  # (queries, keys)
    return np.asarray(drawn >= math.floor(rate * 2**32))


def random123(x0: Words, x1: Words, x2: Words, x3: Words, k0: int, k1: int) -> list[Words]:
    """Return philox4x32-10 of the words of a counter, uint64 below 2**32, and of a key: figure 2 of Salmon et al."""
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0 = (right >> np.uint64(32)) ^ x1 ^ np.uint64(k0)
        x1 = right & LOW
        x2 = (left >> np.uint64(32)) ^ x3 ^ np.uint64(k1)
        x3 = left & LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [x0, x1, x2, x3]
