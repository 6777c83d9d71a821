"""One attention problem as all ranks agree on it: sizes, dtype, layout, mask; pure integers, no MPI."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import layout
from .arrays import DTYPES, Spec
from .mask import Mask, Positions, counts
from .softmax import accumulator


def _kept(method: Callable[[Problem, int], list[Spec]]) -> Callable[[Problem, int], list[Spec]]:
    """Keep what a method returns for each rank: in one process n virtual ranks ask n times each."""

    @functools.wraps(method)
    def kept(self: Problem, rank: int) -> list[Spec]:
        known = self.__dict__.setdefault(f"_{method.__name__}", {})
        if rank not in known:
            result = method(self, rank)
            known[rank] = known.setdefault(tuple(result), result)  # equal chunks share one list
        return known[rank]  # type: ignore[no-any-return]

    return kept


@dataclass(frozen=True)
class Problem:
    """Attention of a sequence of queries against a sequence of keys, spread over ranks.

    Attributes
    ----------
    ranks : int
    batch, heads, kv_heads, head_dim, v_head_dim : int
        Arrays are (batch, heads, tokens, head_dim); K and V have kv_heads, V its own head_dim.
    q_tokens, kv_tokens : int
        Lengths of the whole sequences.
    dtype : numpy dtype
        Of Q, K, V as stored and sent; partial sums are `accumulator(dtype)`.
    layout : str
    mask : Mask
    """

    ranks: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_tokens: int
    kv_tokens: int
    dtype: np.dtype[Any]
    layout: str
    mask: Mask

    @cached_property
    def q_positions(self) -> list[Positions]:
        """Each rank's query positions."""
        return [layout.positions(self.layout, self.q_tokens, self.ranks, r) for r in range(self.ranks)]

    @cached_property
    def kv_positions(self) -> list[Positions]:
        """Each rank's key positions."""
        return [layout.positions(self.layout, self.kv_tokens, self.ranks, r) for r in range(self.ranks)]

    @cached_property
    def needed(self) -> NDArray[np.bool_]:
        """Which blocks the mask leaves something of: (query chunks, key chunks)."""
        result: NDArray[np.bool_] = self.pairs > 0
        return result

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """How many pairs the mask leaves of each block: (query chunks, key chunks)."""
        return counts(self.mask, self.q_positions, self.kv_positions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that is a number, so that ranks can compare."""
        counts = self.ranks, self.batch, self.heads, self.kv_heads, self.head_dim, self.v_head_dim
        return *counts, self.q_tokens, self.kv_tokens, DTYPES.index(self.dtype)

    @property
    def wide(self) -> np.dtype[Any]:
        """The dtype of partial sums."""
        return accumulator(self.dtype)

    def by_heads(self, ranks: int) -> list[tuple[slice, slice, Problem]]:
        """Return each rank's query heads, its K/V heads, and the problem that these pose; see `layout.heads`."""
        parts = []
        for rank in range(ranks):
            heads, kv_heads = layout.heads(self.heads, self.kv_heads, ranks, rank)
            part = replace(self, heads=heads.stop - heads.start, kv_heads=kv_heads.stop - kv_heads.start)
            vars(part).update(q_positions=self.q_positions, kv_positions=self.kv_positions)
            parts.append((heads, kv_heads, part))
        return parts

    # What travels. The widest dtype comes first in each list.

    @_kept
    def q(self, rank: int) -> list[Spec]:
        """Q of one rank."""
        return [self._query(rank, self.head_dim, self.dtype)]

    @_kept
    def kv(self, rank: int) -> list[Spec]:
        """K, V of one rank."""
        return [self._key(rank, self.head_dim, self.dtype), self._key(rank, self.v_head_dim, self.dtype)]

    @_kept
    def o(self, rank: int) -> list[Spec]:
        """Partial out, lse of one rank's queries."""
        return [self._query(rank, self.v_head_dim, self.wide), self._row(rank)]

    @_kept
    def q_backward(self, rank: int) -> list[Spec]:
        """lse, delta, Q, dO of one rank."""
        return [self._row(rank), self._row(rank), *self.q(rank), self._query(rank, self.v_head_dim, self.dtype)]

    @_kept
    def d_q(self, rank: int) -> list[Spec]:
        """Partial dQ of one rank's queries."""
        return [self._query(rank, self.head_dim, self.wide)]

    @_kept
    def d_kv(self, rank: int) -> list[Spec]:
        """Partial dK, dV of one rank's keys."""
        return [self._key(rank, self.head_dim, self.wide), self._key(rank, self.v_head_dim, self.wide)]

    def qkv(self, rank: int) -> list[Spec]:
        """Q, K, V of one rank."""
        return self.q(rank) + self.kv(rank)

    def out(self, rank: int) -> list[Spec]:
        """Complete lse, out of one rank's queries."""
        return [self._row(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_out(self, rank: int) -> list[Spec]:
        """lse, delta, dO of one rank."""
        return [self._row(rank), self._row(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_qkv(self, rank: int, partial: bool) -> list[Spec]:
        """dK, dV of one rank's keys, complete or partial sums, and complete dQ of its queries."""
        return [(shape, self.wide if partial else self.dtype) for shape, _ in self.kv(rank)] + self.q(rank)

    def _query(self, rank: int, dim: int, dtype: np.dtype[Any]) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank]), dim), dtype

    def _key(self, rank: int, dim: int, dtype: np.dtype[Any]) -> Spec:
        return (self.batch, self.kv_heads, len(self.kv_positions[rank]), dim), dtype

    def _row(self, rank: int) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank])), self.wide


@dataclass(frozen=True)
class Travel:
    """How far a chunk goes round its ring, in hops: to its first user, to its last (1 and 0: nobody needs it)."""

    first: int
    last: int


def travels(users: NDArray[np.bool_], start: int = 1) -> list[Travel]:
    """Return how far each chunk of a ring travels.

    Parameters
    ----------
    users : bool, (owners, places)
        Whether the rank at a place of the ring uses the chunk of an owner.
    start : int
        The first hop that counts: 0 where the chunk begins its way at another rank than its owner.
    """
    return _travels(users.astype(bool).tobytes(), len(users), start)


@functools.lru_cache(maxsize=64)
def _travels(table: bytes, n: int, start: int) -> list[Travel]:
    users = np.frombuffer(table, bool).reshape(n, n)
    places = np.add.outer(np.arange(n), np.arange(start, n)) % max(n, 1)
    uses = np.take_along_axis(users, places, axis=1)
    result = []
    for row in uses:
        hops = np.flatnonzero(row) + start
        result.append(Travel(int(hops[0]), int(hops[-1])) if len(hops) else Travel(1, 0))
    return result


def windows(
    needed: NDArray[np.bool_], rows: Sequence[Sequence[int]]
) -> tuple[dict[int, Travel], list[dict[int, Travel]]]:
    """Return how far each chunk travels in a double ring: along its column, and in each window along a row.

    Parameters
    ----------
    needed : bool, (query chunks, key chunks)
    rows : the ranks of each row of the grid
        In window w, row r has the chunks of row r - w.
    """
    along_col: dict[int, Travel] = {}
    along_row: list[dict[int, Travel]] = []
    for column in zip(*rows, strict=True):
        users = [[needed[row, owner].any() for row in rows] for owner in column]
        along_col.update(zip(column, travels(np.array(users)), strict=True))
    for window in range(len(rows)):
        ways: dict[int, Travel] = {}
        for r, owners in enumerate(rows):
            users = needed[np.ix_(rows[(r + window) % len(rows)], owners)].T
            ways.update(zip(owners, travels(users, start=0 if window else 1), strict=True))
        along_row.append(ways)
    return along_col, along_row
