"""One attention problem as all ranks agree on it: sizes, dtype, layout, mask; pure integers, no MPI."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import layout
from .arrays import DTYPES, Spec
from .mask import Mask, Positions, counts
from .softmax import accumulator


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

    # What travels. The widest dtype comes first in each list.

    def q(self, rank: int) -> list[Spec]:
        """Q of one rank."""
        return [self._query(rank, self.head_dim, self.dtype)]

    def kv(self, rank: int) -> list[Spec]:
        """K, V of one rank."""
        return [self._key(rank, self.head_dim, self.dtype), self._key(rank, self.v_head_dim, self.dtype)]

    def o(self, rank: int) -> list[Spec]:
        """Partial out, lse of one rank's queries."""
        return [self._query(rank, self.v_head_dim, self.wide), self._row(rank)]

    def q_backward(self, rank: int) -> list[Spec]:
        """lse, delta, Q, dO of one rank."""
        return [self._row(rank), self._row(rank), *self.q(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_q(self, rank: int) -> list[Spec]:
        """Partial dQ of one rank's queries."""
        return [self._query(rank, self.head_dim, self.wide)]

    def d_kv(self, rank: int) -> list[Spec]:
        """Partial dK, dV of one rank's keys."""
        return [self._key(rank, self.head_dim, self.wide), self._key(rank, self.v_head_dim, self.wide)]

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


def travels(users: NDArray[np.bool_]) -> list[Travel]:
    """Return how far each chunk of a ring travels.

    Parameters
    ----------
    users : bool, (owners, places)
        Whether the rank at a place of the ring uses the chunk of an owner.
    """
    n = len(users)
    result = []
    for owner in range(n):
        hops = [hop for hop in range(1, n) if users[owner, (owner + hop) % n]]
        result.append(Travel(min(hops), max(hops)) if hops else Travel(1, 0))
    return result
