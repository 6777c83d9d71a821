"""One attention problem as all ranks agree on it: sizes, dtype, layout, mask; pure integers, no MPI."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import layout
from .arrays import DTYPES, Spec
from .mask import Full, Mask, Positions, counts
from .message import InputError
from .softmax import accumulator

GRAIN = 128  # queries: a multiple of them is what kernels take best

PARTIALS = ("wide", "narrow")
"""How partial sums travel: as they are added up, or rounded to the dtype of the input."""


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
def _joined(layout_name: str, tokens: int, ranks: int, owners: tuple[int, ...]) -> tuple[Positions, list[Positions]]:
    chunks = [_positions(layout_name, tokens, ranks)[owner] for owner in owners]
    whole = np.sort(np.concatenate(chunks))
    return whole, [np.searchsorted(whole, chunk) for chunk in chunks]


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
        Of Q, K, V as stored and sent; partial sums are `accumulator(dtype)`.
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
    dtype: np.dtype[Any]
    layout: str
    mask: Mask
    spread_heads: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    partials: str = field(default="wide", kw_only=True)

    @cached_property
    def q_positions(self) -> list[Positions]:
        """Each rank's query positions."""
        return _positions(self.layout, self.q_tokens, self.ranks)

    @cached_property
    def kv_positions(self) -> list[Positions]:
        """Each rank's key positions."""
        return _positions(self.layout, self.kv_tokens, self.ranks)

    def queries_of(self, owners: Sequence[int]) -> tuple[Positions, list[Positions]]:
        """Return the positions of several ranks' queries together, ascending, and where each rank's lie among them."""
        return _joined(self.layout, self.q_tokens, self.ranks, tuple(owners))

    def keys_of(self, owners: Sequence[int]) -> tuple[Positions, list[Positions]]:
        """Return the positions of several ranks' keys together, ascending, and where each rank's lie among them."""
        return _joined(self.layout, self.kv_tokens, self.ranks, tuple(owners))

    @cached_property
    def needed(self) -> NDArray[np.bool_]:
        """Which blocks the mask leaves something of: (query chunks, key chunks)."""
        result: NDArray[np.bool_] = self.pairs > 0
        return result

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """How many pairs the mask leaves of each block: (query chunks, key chunks)."""
        if type(self) is Problem:
            return _pairs(self.mask, self.layout, self.q_tokens, self.kv_tokens, self.ranks)
        return counts(self.mask, self.q_positions, self.kv_positions)

    def halves(self, rank: int) -> list[tuple[slice, Positions]]:
        """Cut a rank's queries in two that see as many of its own keys; return each part and its positions."""
        queries, keys = self.q_positions[rank], self.kv_positions[rank]
        start, stop = (np.searchsorted(keys, bound) for bound in self.mask.bounds(queries))
        seen = np.cumsum(np.maximum(stop - start, 0))
        cut = int(np.searchsorted(seen, seen[-1] / 2)) + 1 if len(seen) else 0
        cut -= cut % GRAIN if cut > GRAIN else 0
        return [(part, queries[part]) for part in (slice(cut), slice(cut, len(queries)))]

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
        return [self._row(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_out(self, rank: int) -> list[Spec]:
        """lse, delta, dO of one rank."""
        return [self._row(rank), self._row(rank), self._query(rank, self.v_head_dim, self.dtype)]

    def d_qkv(self, rank: int, partial: bool) -> list[Spec]:
        """dK, dV of one rank's keys, complete or partial sums, and complete dQ of its queries."""
        return (self.sent(self.d_kv(rank)) if partial else self.kv(rank)) + self.q(rank)

    def _query(self, rank: int, dim: int, dtype: np.dtype[Any]) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank]), dim), dtype

    def _key(self, rank: int, dim: int, dtype: np.dtype[Any]) -> Spec:
        return (self.batch, self.kv_heads, len(self.kv_positions[rank]), dim), dtype

    def _row(self, rank: int) -> Spec:
        return (self.batch, self.heads, len(self.q_positions[rank])), self.wide


@dataclass(frozen=True)
class CacheProblem(Problem):
    """Attention of the last tokens of a sequence, the same on every rank, to a cache spread over ranks.

    Attributes
    ----------
    shards : for each rank, (tokens, position of the first, position after the last) of its part of the cache
    given : bytes or None
        Positions of this rank's part, int64, where they do not follow from the layout.
    """

    shards: tuple[tuple[int, int, int], ...]
    given: bytes | None

    @cached_property
    def queries(self) -> Positions:
        """Positions of the queries: the last ones of the sequence."""
        first = max(max(end for *_, end in self.shards) - self.q_tokens, 0)
        return np.arange(first, first + self.q_tokens)

    @cached_property
    def q_positions(self) -> list[Positions]:
        """Each rank's query positions."""
        return [self.queries] * self.ranks

    @cached_property
    def kv_positions(self) -> list[Positions]:
        """Each rank's key positions; where they were given, as if a shard were one run: no rank knows all."""
        return [self._shard(rank) for rank in range(self.ranks)]

    def keys(self, rank: int) -> Positions:
        """Return the positions of this rank's keys."""
        return self._shard(rank) if self.given is None else np.frombuffer(self.given, np.int64)

    def _shard(self, rank: int) -> Positions:
        tokens, first, end = self.shards[rank]
        if tokens == end - first or self.given is not None:
            return np.arange(first, first + tokens)
        return layout.positions(self.layout, self.kv_tokens, self.ranks, rank)

    @cached_property
    def sees(self) -> list[bool]:
        """Whether the mask lets a query reach between the first and the last key of each rank."""
        lo, hi = self.mask.bounds(self.queries)
        return [
            tokens > 0 and bool((np.maximum(lo, first) < np.minimum(hi, end)).any())
            for tokens, first, end in self.shards
        ]


def span(positions: Any, shape: tuple[int, ...]) -> list[int]:
    """Return of a shard's positions: if they are given, if they are sound, the first, and one after the last."""
    if positions is None:
        return [0, 1, 0, 0]
    sound = isinstance(positions, np.ndarray) and positions.dtype == np.int64 and positions.shape == shape[2:3]
    if not (sound and (np.diff(positions, prepend=-1) > 0).all()):
        return [1, 0, 0, 0]
    return [1, 1, positions[0], positions[-1] + 1] if len(positions) else [1, 1, 0, 0]


def posed_to_cache(
    specs: Sequence[Sequence[Any]], spans: Sequence[Sequence[int]], own: Positions | None, name: str, mask: Mask
) -> CacheProblem:
    """Return the problem that all ranks' q, k, v and positions pose, or raise InputError, the same on every rank.

    Parameters
    ----------
    specs : for each rank, (shape, dtype) of q, k and v, which fit together
    spans : for each rank, what `span` returned, and a checksum of q
    own : positions of this rank's keys, where they are given
    name, mask : the layout's name, and the mask
    """
    ranks = len(specs)
    for rank, ((q, *_), (has, sound, *_, checksum)) in enumerate(zip(specs, spans, strict=True)):
        if q != specs[0][0]:
            raise InputError(f"q is {q[0]} on rank {rank}, {specs[0][0][0]} on rank 0: all ranks take the same queries")
        if checksum != spans[0][-1]:
            raise InputError(f"q on rank {rank} holds other numbers than on rank 0: all ranks take the same queries")
        if has != spans[0][0]:
            raise InputError(f"kv_positions are given on rank {0 if spans[0][0] else rank}, not on all ranks")
        if not sound:
            raise InputError(f"kv_positions on rank {rank} must be int64, 0 or more, ascending, one for each key")
    (q, dtype), (k, _), (v, _) = specs[0]
    tokens = [shape[2] for _, (shape, _), _ in specs]
    ends = list(itertools.accumulate(tokens))
    if own is not None:
        shards = [(count, first, end) for count, (_, _, first, end, _) in zip(tokens, spans, strict=True)]
    elif name == "contiguous":
        shards = [(count, end - count, end) for count, end in zip(tokens, ends, strict=True)]
    else:
        owned = [layout.positions(name, ends[-1], ranks, rank) for rank in range(ranks)]
        for rank, (count, chunk) in enumerate(zip(tokens, owned, strict=True)):
            if count != len(chunk):
                raise InputError(
                    f"k on rank {rank} has {count} tokens, the {name} layout gives it {len(chunk)} of {ends[-1]}: "
                    "a cache of other shards is contiguous, or has kv_positions"
                )
        shards = [(len(chunk), *((int(chunk[0]), int(chunk[-1]) + 1) if len(chunk) else (0, 0))) for chunk in owned]
    batch, heads, q_tokens, head_dim = q
    length = max(end for *_, end in shards)
    if q_tokens > length and mask != Full():
        raise InputError(f"the {q_tokens} queries are the last tokens of a sequence of {length}: their keys come first")
    try:
        mask.check(length, length)
    except ValueError as error:
        raise InputError(str(error)) from None
    given = None if own is None else own.tobytes()
    sizes = batch, heads, k[1], head_dim, v[3], q_tokens, ends[-1]
    return CacheProblem(ranks, *sizes, dtype, name, mask, tuple(shards), given)


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
    return _windows(needed.astype(bool).tobytes(), tuple(map(tuple, rows)))


@functools.lru_cache(maxsize=4)
def _windows(table: bytes, rows: tuple[tuple[int, ...], ...]) -> tuple[dict[int, Travel], list[dict[int, Travel]]]:
    needed = np.frombuffer(table, bool).reshape(2 * [sum(map(len, rows))])
    along_col: dict[int, Travel] = {}
    along_row: list[dict[int, Travel]] = []
    for column in zip(*rows, strict=True):
        users = [[needed[list(row), owner].any() for row in rows] for owner in column]
        along_col.update(zip(column, travels(np.array(users)), strict=True))
    for window in range(len(rows)):
        ways: dict[int, Travel] = {}
        for r, owners in enumerate(rows):
            users = needed[np.ix_(rows[(r + window) % len(rows)], owners)].T
            ways.update(zip(owners, travels(users, start=0 if window else 1), strict=True))
        along_row.append(ways)
    return along_col, along_row
