"""One attention problem as all ranks agree on it: sizes, dtype, layout, mask; pure integers, no MPI."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..arrays import DTYPES, Spec, accumulator
from ..arrays.places import Places
from ..arrays.softmax import LSE
from . import layout
from .block import ALL, Block
from .mask import Mask, Positions
from .pairs import counts
from .travel import Travel, travels

GRAIN = 128  # queries: a multiple of them is what kernels take best

PARTIALS = ("wide", "narrow")
"""Ways in which partial sums travel: as they are added up, or rounded to the dtype of the input."""


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


@functools.lru_cache(maxsize=4)
def _positions(layout_name: str, tokens: int, ranks: int) -> list[Positions]:
    return [layout.positions(layout_name, tokens, ranks, rank) for rank in range(ranks)]


@functools.lru_cache(maxsize=64)
def _joined(layout_name: str, tokens: int, ranks: int, owners: tuple[int, ...]) -> tuple[Positions, list[Places]]:
    chunks = [_positions(layout_name, tokens, ranks)[owner] for owner in owners]
    whole = np.sort(np.concatenate(chunks))
    return whole, [Places(np.searchsorted(whole, chunk)) for chunk in chunks]


@functools.lru_cache(maxsize=4)
def _pairs(mask: Mask, layout_name: str, q_tokens: int, kv_tokens: int, ranks: int) -> NDArray[np.int64]:
    return counts(mask, _positions(layout_name, q_tokens, ranks), _positions(layout_name, kv_tokens, ranks))


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
        Of Q, K, V as stored and sent; partial sums are `accumulator(dtype)`, lse is `LSE`.
    layout : str
    mask : Mask
    spread_heads : tuple of (int, int)
        How many query and K/V heads each rank has, where ranks have all tokens of some of the heads; else empty.
    partials : {"wide", "narrow"}
        Whether partial sums travel as they are added up, or rounded to `dtype` for each hop.
    """

    ranks: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_tokens: int
    kv_tokens: int
    dtype: np.dtype[np.generic]
    layout: str
    mask: Mask
    spread_heads: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    partials: str = field(default="wide", kw_only=True)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the sequences that the mask is of: of queries and of keys."""
        return self.q_tokens, self.kv_tokens

    @cached_property
    def queries(self) -> Positions:
        """Positions of all queries, consecutive."""
        return np.arange(self.q_tokens, dtype=np.int64)

    @cached_property
    def q_positions(self) -> list[Positions]:
        """Each rank's query positions."""
        return _positions(self.layout, self.q_tokens, self.ranks)

    @cached_property
    def kv_positions(self) -> list[Positions]:
        """Each rank's key positions."""
        return _positions(self.layout, self.kv_tokens, self.ranks)

    def queries_of(self, owners: Sequence[int]) -> tuple[Positions, list[Places]]:
        """Return the positions of several ranks' queries together, ascending, and where each rank's lie among them."""
        return _joined(self.layout, self.q_tokens, self.ranks, tuple(owners))

    def keys_of(self, owners: Sequence[int]) -> tuple[Positions, list[Places]]:
        """Return the positions of several ranks' keys together, ascending, and where each rank's lie among them."""
        return _joined(self.layout, self.kv_tokens, self.ranks, tuple(owners))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {}

    @cached_property
    def ways(self) -> list[Travel]:
        """The way of each rank's K/V round a ring of all ranks."""
        return travels(self.needed.T)  # needed: bool, (query chunks, key chunks), False where the mask empties it

    @cached_property
    def needed(self) -> NDArray[np.bool_]:
        """Whether the mask leaves something of each block: bool, (query chunks, key chunks)."""
        result: NDArray[np.bool_] = self.pairs > 0
        return result

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Pairs that the mask leaves of each block: int64, (query chunks, key chunks)."""
        return _pairs(self.mask, self.layout, self.q_tokens, self.kv_tokens, self.ranks)

    def block(self, q_owner: int, kv_owner: int, rows: slice = ALL) -> Block | None:
        """Return the block of a rank's queries, or of some of them, and a rank's keys; None where the mask empties it.

        Parameters
        ----------
        q_owner, kv_owner : int
        rows : slice
            Which of the queries; see `halves`.
        """
        pairs = self.pairs.item(q_owner, kv_owner)
        if not pairs:
            return None
        pairs = self._numbers.setdefault(pairs, pairs)  # in one process n virtual ranks ask for n blocks each
        queries, keys = self.q_positions[q_owner], self.kv_positions[kv_owner]
        if rows == ALL:
            return Block(self.mask, queries, keys, ALL, pairs)
        part = queries[rows]
        return Block(self.mask, part, keys, rows) if len(part) else None

    def halves(self, rank: int) -> tuple[slice, slice]:
        """Cut a rank's queries in two that see as many of its own keys: return the rows of each."""
        queries, keys = self.q_positions[rank], self.kv_positions[rank]
        start, stop = (np.searchsorted(keys, bound) for bound in self.mask.bounds(queries))
        seen = np.cumsum(np.maximum(stop - start, 0))
        cut = int(np.searchsorted(seen, seen[-1] / 2)) + 1 if len(seen) else 0
        cut -= cut % GRAIN if cut > GRAIN else 0
        return slice(cut), slice(cut, len(queries))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that is a number, so that ranks can compare."""
        counts = self.ranks, self.batch, self.heads, self.kv_heads, self.head_dim, self.v_head_dim
        return *counts, self.q_tokens, self.kv_tokens, DTYPES.index(self.dtype)

    @property
    def q_spread(self) -> bool:
        """Whether the ranks share out the queries, and don't all have all of them."""
        return 0 < self.q_tokens == sum(map(len, self.q_positions))

    @property
    def wide(self) -> np.dtype[np.generic]:
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

    # What travels. The widest dtype comes first in each list, but for (out, lse): up to 4 bytes lie between these.

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
        return [self._query(rank, self.v_head_dim, self.wide), self._row(rank, LSE)]

    @_kept
    def q_backward(self, rank: int) -> list[Spec]:
        """lse, delta, Q, dO of one rank."""
        return [*self._rows(rank), *self.q(rank), self._query(rank, self.v_head_dim, self.dtype)]

    @_kept
    def d_q(self, rank: int) -> list[Spec]:
        """Partial dQ of one rank's queries."""
        return [self._query(rank, self.head_dim, self.wide)]

    @_kept
    def d_kv(self, rank: int) -> list[Spec]:
        """Partial dK, dV of one rank's keys."""
        return [self._key(rank, self.head_dim, self.wide), self._key(rank, self.v_head_dim, self.wide)]

    def sent(self, sums: list[Spec]) -> list[Spec]:
        """Partial sums as they travel; rows, such as lse, are never rounded."""
        if self.partials == "wide":
            return sums
        result = [(shape, self.dtype if len(shape) == 4 else dtype) for shape, dtype in sums]
        kept: list[Spec] = self.__dict__.setdefault("_sent", {}).setdefault(tuple(result), result)
        return kept

    def qkv(self, rank: int) -> list[Spec]:
        """Q, K, V of one rank."""
        return self.q(rank) + self.kv(rank)

    def out(self, rank: int) -> list[Spec]:
        """Complete lse, out of one rank's queries."""
        return [self._row(rank, LSE), self._query(rank, self.v_head_dim, self.dtype)]

    def d_out(self, rank: int) -> list[Spec]:
        """lse, delta, dO of one rank."""
        return [*self._rows(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_qkv(self, rank: int, partial: bool) -> list[Spec]:
        """dK, dV of one rank's keys, complete or partial sums, and complete dQ of its queries."""
        return (self.sent(self.d_kv(rank)) if partial else self.kv(rank)) + self.q(rank)

    def _query(self, rank: int, dim: int, dtype: np.dtype[np.generic]) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank]), dim), dtype

    def _key(self, rank: int, dim: int, dtype: np.dtype[np.generic]) -> Spec:
        return (self.batch, self.kv_heads, len(self.kv_positions[rank]), dim), dtype

    def _row(self, rank: int, dtype: np.dtype[np.generic]) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank])), dtype

    def _rows(self, rank: int) -> list[Spec]:
        """lse, delta."""
        return [self._row(rank, LSE), self._row(rank, self.wide)]
