"""Layouts: which global token positions each rank owns, for any token count and any number of ranks.

A chunk is described by its explicit positions, ascending, never by `length // n`, so uneven lengths and
empty ranks need no special case anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import InputError
from .mask import Positions
from .scalars import shown, whole


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

EVERYWHERE = "everywhere"
"""Layout of an algorithm that gives every rank all tokens, of some of the heads; see `heads`."""


def default(mask: object) -> str:
    """Return the layout where none is asked for: zigzag balances a causal mask, but not one of a window.

    The keys of a window are near its queries: contiguous chunks go to a neighbour or two, not all the way round.
    """
    balances = getattr(mask, "causal", False) and not getattr(mask, "windowed", False)
    return "zigzag" if balances else "contiguous"


def check(layout: str, ranks: int = 0) -> str:
    """Return the layout's name, or raise ValueError with the names there are."""
    if isinstance(layout, str) and layout == EVERYWHERE:
        raise ValueError(
            f"the layout {EVERYWHERE!r} is that of an attention that shares out heads, not tokens: give scatter and "
            f"gather attention.owned(name, shapes) instead of it, or choose from {', '.join(LAYOUTS)}"
        )
    name, _, parts = layout.partition("/") if isinstance(layout, str) else ("", "", "")
    if name not in LAYOUTS or not (parts or "1").isdecimal() or int(parts or 1) < 1:
        raise ValueError(f"unknown layout {shown(layout)}: choose from {', '.join(LAYOUTS)}")
    if ranks % int(parts or 1):
        raise ValueError(f"layout {layout!r} takes a multiple of {parts} ranks, not {ranks}")
    return layout


def positions(layout: str, tokens: object, ranks: int, rank: int) -> Positions:
    """Return the global positions that `rank` owns, ascending.

    Parameters
    ----------
    layout : str
        A name in `LAYOUTS`, for ranks that each own a chunk of their own; or "zigzag/2", for chunks that 2
        neighbours share: each has a run of them, as even as can be.
    tokens : int
        Length of the whole sequence, 0 or more; also a NumPy scalar.
    ranks, rank : int
        How many ranks share it, and which one is meant.

    Returns
    -------
    int64, (tokens of this rank,)
    """
    given, tokens = tokens, whole(tokens)  # a product of NumPy's small integers would overflow
    if tokens is None or tokens < 0:
        raise InputError(f"tokens are a whole number, 0 or more, got {shown(given)}")
    if layout == EVERYWHERE:
        return np.arange(tokens, dtype=np.int64)
    name, _, number = check(layout, ranks).partition("/")
    parts = int(number or 1)
    chunk = LAYOUTS[name](tokens, ranks // parts, rank // parts)
    return chunk if parts == 1 else chunk[_runs(len(chunk), parts, rank % parts)]


def heads(count: int, kv_count: int, ranks: int, rank: int) -> tuple[slice, slice]:
    """Return the query heads and the K/V heads of `rank`, for algorithms that spread heads over ranks.

    K/V heads are cut as even as can be, and their query heads with them. Where they are fewer than ranks,
    neighbours share a K/V head and cut its query heads; what is left without any has no K/V head either.
    """
    group = count // kv_count
    if ranks <= kv_count:
        first, last = rank * kv_count // ranks, (rank + 1) * kv_count // ranks
        return slice(first * group, last * group), slice(first, last)
    head = rank * kv_count // ranks
    begin, end = (-(-h * ranks // kv_count) for h in (head, head + 1))  # the ranks that share the K/V head
    first, last = ((place - begin) * group // (end - begin) for place in (rank, rank + 1))
    return slice(head * group + first, head * group + last), slice(head, head + (last > first))
