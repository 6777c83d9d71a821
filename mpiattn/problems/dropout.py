"""Dropout of attention's probabilities, decided for each one by where it stands in the whole problem.

A probability of (batch, head, query, key), all numbered globally, is dropped if a 32-bit number is less than
floor(rate * 2**32). The number is word `key % 4` of Philox4x32-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405)
of the counter (key // 4, query, head, batch), each modulo 2**32, and the key (seed % 2**32, seed // 2**32). So the
same ones are dropped on any number of ranks, in any layout, by any algorithm, forward and backward, and nothing is
stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .scalars import real, whole

Words = NDArray[np.uint64]

WORD = 2**32
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention's probabilities; those kept are multiplied by 1 / (1 - rate).

    Parameters
    ----------
    rate : float
        The part that is dropped, 0 or more and less than 1.
    seed : int
        Less than 2**64; another one for each layer and each step of a training.

    Raises
    ------
    InputError
        A ValueError, where they are anything else.
    """

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        rate, seed = real(self.rate), whole(self.seed)
        if rate is None or not 0 <= rate < 1:
            raise InputError(f"a dropout rate is 0 or more and less than 1, got {self.rate!r}")
        if seed is None or not 0 <= seed < 2**64:
            raise InputError(f"a dropout seed is a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "seed", seed)

    def kept(self, batch: int, head: int, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which probabilities of a head are kept: bool, (queries, keys).

        Parameters
        ----------
        batch, head : int
            Numbers among all batches and all query heads.
        queries, keys : int64
            Global positions.
        """
        blocks, place = np.unique(keys // 4, return_inverse=True)
        counter = [
            _low(blocks[:, None].astype(np.uint64)),
            _low(queries[None].astype(np.uint64)),
            np.uint64(head),
            np.uint64(batch),
        ]
        words = np.stack(np.broadcast_arrays(*philox(counter, (self.seed % WORD, self.seed // WORD))))
        kept: NDArray[np.bool_] = (words >= np.uint64(self.rate * WORD))[keys % 4, place]
        return np.transpose(kept)


def philox(counter: Sequence[Words], key: tuple[int, int]) -> Sequence[Words]:
    """Return the four words of Philox4x32-10 of a counter of four and a key of two; arrays are broadcast."""
    a, b, c, d = counter
    for r in range(ROUNDS):
        left, right = (np.uint64((word + r * step) % WORD) for word, step in zip(key, WEYL, strict=True))
        first, second = np.uint64(MULTIPLIERS[0]) * a, np.uint64(MULTIPLIERS[1]) * c
        a, b, c, d = _high(second) ^ b ^ left, _low(second), _high(first) ^ d ^ right, _low(first)
    return a, b, c, d


def _high(product: Words) -> Words:
    high: Words = product >> np.uint64(32)
    return high


def _low(product: Words) -> Words:
    low: Words = product & np.uint64(WORD - 1)
    return low
