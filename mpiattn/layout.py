"""Layouts: which global token positions each rank owns, for any token count and any number of ranks.

A chunk is described by its explicit positions, ascending, never by `length // n`, so uneven lengths and
empty ranks need no special case anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def _runs(tokens: int, runs: int, run: int) -> Positions:
    """Return run number `run` of a sequence cut into `runs` consecutive runs, as even as can be."""
    return np.arange(run * tokens // runs, (run + 1) * tokens // runs, dtype=np.int64)


def contiguous(tokens: int, ranks: int, rank: int) -> Positions:
    """One run a rank, in rank order."""
    return _runs(tokens, ranks, rank)


def zigzag(tokens: int, ranks: int, rank: int) -> Positions:
    """Two runs a rank, one from each end: a causal mask then gives every rank the same work.

    Rank i owns runs i and 2n-1-i of 2n (as in Llama 3's training, arXiv 2407.21783, section 3.3.2).
    """
    return np.concatenate([_runs(tokens, 2 * ranks, rank), _runs(tokens, 2 * ranks, 2 * ranks - 1 - rank)])


def striped(tokens: int, ranks: int, rank: int) -> Positions:
    """Every n-th token, starting at the rank (Striped Attention, arXiv 2311.09431)."""
    return np.arange(rank, tokens, ranks, dtype=np.int64)


LAYOUTS: dict[str, Callable[[int, int, int], Positions]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}


def check(layout: str) -> str:
    """Return the layout's name, or raise ValueError with the names there are."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    return layout


def positions(layout: str, tokens: int, ranks: int, rank: int) -> Positions:
    """Return the global positions that `rank` owns, ascending.

    Parameters
    ----------
    layout : str
        A name in `LAYOUTS`.
    tokens : int
        Length of the whole sequence.
    ranks, rank : int
        How many ranks share it, and which one is meant.

    Returns
    -------
    int64, (tokens of this rank,)
    """
    return LAYOUTS[check(layout)](tokens, ranks, rank)
