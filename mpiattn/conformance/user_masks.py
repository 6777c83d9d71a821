"""Masks as users write them, for the matrix of cases: of their own classes, with bounds of several dtypes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..problems import mask as masks
from ..problems.mask import Mask, Positions


class Prefix(Mask):
    """Causal, but for the first tokens, which all see each other (prefix LM, arXiv 1910.10683)."""

    causal = True  # but for the prefix: zigzag balances it

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        """Return int64, as the masks of the package do."""
        return np.zeros_like(queries), np.maximum(queries + 1, self.tokens)


class Chunks(Mask):
    """Runs of as many tokens that see themselves and all runs before, as in models of whole images."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def bounds(self, queries: Positions) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return int32."""
        ends = (queries // self.tokens + 1) * self.tokens
        return np.zeros(len(queries), np.int32), ends.astype(np.int32)


class Ahead(Mask):
    """Each query sees the keys from so many before it on, with bounds far beyond int64."""

    def __init__(self, left: int) -> None:
        self.left = left

    def bounds(self, queries: Positions) -> tuple[NDArray[np.uint64], NDArray[np.object_]]:
        """Return uint64 and Python's integers; works in place on what it is given."""
        queries -= self.left
        return np.maximum(queries, 0).astype(np.uint64), np.full(len(queries), 10**30, object)


MASKS: dict[str, Callable[[int], Mask]] = {"prefix": Prefix, "chunks": Chunks, "ahead": Ahead}


def parse(text: str) -> Mask:
    """Return a mask from text: as `problems.mask.parse`, or prefix=N, chunks=N, ahead=N among the parts."""
    parts = []
    for part in text.split("+"):
        name, _, tokens = part.partition("=")
        parts.append(MASKS[name](int(tokens)) if name in MASKS else masks.parse(part))
    return functools.reduce(operator.and_, parts)
