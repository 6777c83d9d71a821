"""Block attention on one rank in NumPy: forward and backward of some queries against some keys.

Tiled as in FlashAttention-2 (Dao 2023, arXiv 2307.08691), so that memory grows with the tokens and not
with their square, and arranged for what costs time in NumPy, where every elementwise operation is a
pass over the tile of its own:

- Scores are kept in units of log2, because exp2 takes half the time of exp.
- The score tile is transposed, (keys, queries): what belongs to a query, such as its maximum, is then a
  row vector, reduced and broadcast along contiguous memory.
- What would be added to or summed from a tile travels in the matrix products instead. Keys and values
  carry a column of ones. Against it, the query tile's last row holds minus the shift of the softmax,
  that of d_out holds minus delta, and the product with the values yields the sum of each query's weights.
- No maximum is taken where the norms of queries and keys prove that exp2 can't overflow.

A logit softcap follows the product of a score tile, so the shift is added after it and not within the
product. Dropout follows `_exp2`: weights are summed before it, and minus delta is added after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dropout import Dropout
from ..mask import Mask, Positions
from ..softmax import accumulator, merge
from .sums import Sums

Array = NDArray[Any]
Progress = Callable[[], object]

QUERIES, KEYS = 384, 512  # a tile: its scores (768 kB in float32) stay in the second-level cache
SIDE = 128  # keys in a tile at the mask's edge: narrow, so that little of it is masked
LOG2E = math.log2(math.e)
LN2 = math.log(2)

# All in log2. Scores below FLOOR from their row's shift count as FLOOR: far below rounding, and far above
# the denormal numbers, which cost a matrix product 100 times its time. (Keyed by bytes per number.)
FLOOR = {4: -64.0, 8: -128.0}
SAFE = 60.0  # scores within +-SAFE need no shift: 2**60 and its sums are well inside float32
SLACK = 16.0  # how far a score may exceed its row's shift before the shift is raised
FAR = 1e30  # shift of a query that attends to nothing: puts all its scores at FLOOR


class Tile(NamedTuple):
    """Some keys, and those queries of a row of tiles that attend to any of them."""

    keys: slice
    queries: slice  # counted from the row's first query
    visible: NDArray[np.bool_] | None  # (keys, queries); None: every query sees every key


def plan(mask: Mask, q_positions: Positions, k_positions: Positions) -> list[tuple[slice, list[Tile]]]:
    """Return the rows of tiles that the mask leaves of a block: slices of queries, each with its tiles.

    A query sees the keys of indices [start, stop). The keys that a whole row sees make large tiles
    without a mask; those before and after, that some of its queries see, make narrow ones.
    """
    lo, hi = mask.bounds(q_positions)
    start, stop = np.searchsorted(k_positions, lo), np.searchsorted(k_positions, hi)
    # Rows end where the runs jump: between the two parts of a zigzag chunk, between documents.
    jump = np.maximum(np.diff(start), np.diff(stop))
    usual = np.median(jump) if len(jump) else 0
    cuts = np.flatnonzero(jump > usual + SIDE) + 1
    patterns: dict[tuple[int, bytes], NDArray[np.bool_]] = {}  # most masks look alike: the diagonal's
    result = []
    for begin, end in pairwise([0, *map(int, cuts), len(q_positions)]):
        for rows in _cut(begin, end, QUERIES):
            first, last = start[rows], stop[rows]
            some = first < last
            if not some.any():
                continue
            full = int(first.max()), int(last.min())
            if full[0] >= full[1]:
                full = int(last.max()), int(last.max())
            tiles = [Tile(keys, slice(0, len(first)), None) for keys in _cut(*full, KEYS)]
            sides = _cut(int(first[some].min()), full[0], SIDE) + _cut(full[1], int(last[some].max()), SIDE)
            for keys in sides:
                seeing = np.flatnonzero(some & (first < keys.stop) & (last > keys.start))
                if not len(seeing):
                    continue
                queries = slice(int(seeing[0]), int(seeing[-1]) + 1)
                size = keys.stop - keys.start
                runs = np.clip([first[queries] - keys.start, last[queries] - keys.start], 0, size)
                if (size, runs.tobytes()) not in patterns:
                    index = np.arange(size)[:, None]
                    patterns[size, runs.tobytes()] = (index >= runs[0]) & (index < runs[1])
                visible = patterns[size, runs.tobytes()]
                tiles.append(Tile(keys, queries, None if visible.all() else visible))
            result.append((rows, tiles))
    return result


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Cut [begin, end) into the fewest slices of at most `size`, about even, in steps of 16."""
    length, count = end - begin, -(-(end - begin) // size)
    ends = [min(-(-length * i // (16 * count)) * 16, length) for i in range(1, count + 1)]
    return [slice(begin + a, begin + b) for a, b in pairwise([0, *ends])]


class NumpyKernel(Sums):
    """Attention of one rank's block: merged into a running (out, lse), or added to running gradients.

    Arrays are (batch, heads, tokens, head_dim) of float64, float32, float16 or bfloat16, contiguous or
    not. k and v may have fewer heads: query head h uses head h // (heads / kv_heads). What is computed
    and accumulated is `softmax.accumulator(dtype)`, float32 or float64. As in a textbook's 0 * NaN, a NaN in v
    reaches all rows of its tile, not only those that see it; one in q or k reaches the rows that see it.

    Parameters
    ----------
    mask : Mask
        Evaluated on the global positions given with each block.
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) if not given.
    softcap : float, optional
        Scores are softcap * tanh(scale q k^T / softcap).
    """

    def __init__(self, mask: Mask, scale: float | None = None, softcap: float | None = None) -> None:
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.unit = LOG2E if softcap is None else 1 / softcap  # of the products of queries and keys
        self.dropout: Dropout | None = None
        self.first_head = 0
        self._work: dict[str, Array] = {}

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop probabilities from now on, or none, in arrays whose first query head has this number among all."""
        self.dropout, self.first_head = dropout, first_head

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        q_positions: Positions,
        k_positions: Positions,
        out: Array,
        lse: Array,
        progress: Progress | None = None,
    ) -> None:
        """Merge the attention of q to this block's keys into (out, lse), in place.

        Parameters
        ----------
        q : (batch, heads, q_tokens, head_dim)
        k : (batch, kv_heads, k_tokens, head_dim)
        v : (batch, kv_heads, k_tokens, v_head_dim)
        q_positions, k_positions : int64, (q_tokens,) and (k_tokens,)
            Global positions, ascending.
        out : float32 or float64, (batch, heads, q_tokens, v_head_dim)
            Normalised output so far; zeros at the start.
        lse : the same dtype, (batch, heads, q_tokens)
            Natural logarithm of the sum of exponentials so far; -inf at the start.
        progress : callable, optional
            Called before each tile, so that an MPI library can move messages.
        """
        dtype, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
        rows_of_tiles = plan(self.mask, q_positions, k_positions)
        for b, g in np.ndindex(k.shape[:2]):
            keys = self._with_ones("keys", k[b, g], dtype)
            values = self._with_ones("values", v[b, g], dtype)
            longest_key = _longest(keys[:, :-1])
            for h in range(g * group, (g + 1) * group):
                for rows, tiles in rows_of_tiles:
                    query = self._query(q[b, h, rows], dtype)
                    query[-1] = 0
                    limit = longest_key * _longest(query[:-1].T)
                    if self.softcap is not None:
                        limit = min(limit, 1) * self.softcap * LOG2E  # in this order: NaN stays
                    safe = limit < SAFE
                    total = self._buffer("total", (values.shape[1], query.shape[1]), dtype)
                    total[...] = 0
                    for tile in tiles:
                        if progress:
                            progress()
                        seeing, sums = query[:, tile.queries], total[:, tile.queries]
                        score, _ = self._score(keys[tile.keys], seeing)
                        if not safe:
                            self._shift(score, seeing, sums, tile.visible)
                        self._exp2(score, tile.visible, bounded=safe)
                        if self.dropout is None:
                            sums += self._product("part", values[tile.keys].T, score)
                        else:
                            sums[-1] += score.sum(axis=0)
                            score *= self._kept(b, h, q_positions[rows][tile.queries], k_positions[tile.keys], dtype)
                            sums[:-1] += self._product("part", values[tile.keys, :-1].T, score)
                    weight = total[-1]
                    with np.errstate(divide="ignore"):
                        part_lse = LN2 * (np.log2(weight, dtype=np.float64) - query[-1])
                    total[:-1] /= np.where(weight == 0, 1, weight)
                    merge(out[b, h, rows], lse[b, h, rows], total[:-1].T, part_lse)

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        d_out: Array,
        lse: Array,
        delta: Array,
        q_positions: Positions,
        k_positions: Positions,
        d_q: Array,
        d_k: Array,
        d_v: Array,
        progress: Progress | None = None,
    ) -> None:
        """Add this block's share of the gradients to d_q, d_k and d_v, in place.

        Parameters
        ----------
        q, k, v, q_positions, k_positions, progress
            As in `forward`.
        d_out : (batch, heads, q_tokens, v_head_dim)
            Gradient with respect to the output.
        lse, delta : float32 or float64, (batch, heads, q_tokens)
            Of the whole rows, all keys: the final lse, and rowsum(d_out * out).
        d_q, d_k, d_v : float32 or float64, shapes of q, k, v
            Gradients so far; zeros at the start.
        """
        dtype, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
        rows_of_tiles = plan(self.mask, q_positions, k_positions)
        for b, g in np.ndindex(k.shape[:2]):
            keys = self._with_ones("keys", k[b, g], dtype)
            values = self._with_ones("values", v[b, g], dtype)
            d_keys = self._buffer("d_keys", k.shape[2:], dtype)
            d_keys[...] = 0
            for h in range(g * group, (g + 1) * group):
                for rows, tiles in rows_of_tiles:
                    query = self._query(q[b, h, rows], dtype)
                    nothing = np.isneginf(lse[b, h, rows])
                    query[-1] = np.where(nothing, -FAR, -LOG2E * lse[b, h, rows])
                    d_row = self._buffer("d_row", (values.shape[1], query.shape[1]), dtype)
                    d_row[:-1] = d_out[b, h, rows].T
                    d_row[-1] = -delta[b, h, rows]
                    d_row[:, nothing] = 0
                    d_query = self._buffer("d_query", (k.shape[3], query.shape[1]), dtype)
                    d_query[...] = 0
                    for tile in tiles:
                        if progress:
                            progress()
                        seeing, d_seeing = query[:, tile.queries], d_row[:, tile.queries]
                        weight, slope = self._score(keys[tile.keys], seeing, with_slope=True)
                        self._exp2(weight, tile.visible)
                        if self.dropout is None:
                            d_score = self._product("d_score", values[tile.keys], d_seeing)
                            d_score *= weight
                        else:
                            kept = self._kept(b, h, q_positions[rows][tile.queries], k_positions[tile.keys], dtype)
                            d_score = self._product("d_score", values[tile.keys, :-1], d_seeing[:-1])
                            d_score *= kept
                            d_score += d_seeing[-1]
                            d_score *= weight
                            weight *= kept
                        if slope is not None:
                            d_score *= slope
                        d_v[b, g, tile.keys] += self._product("part", weight, d_seeing[:-1].T)
                        d_keys[tile.keys] += self._product("part", d_score, seeing[:-1].T)
                        d_query[:, tile.queries] += self._product("part", keys[tile.keys, :-1].T, d_score)
                    d_query *= self._scale(q)
                    d_q[b, h, rows] += d_query.T
            d_keys /= self.unit  # `query` holds q * scale * unit
            d_k[b, g] += d_keys

    def _scale(self, q: Array) -> float:
        return 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an uninitialised array that lives until its name is asked for again."""
        size = math.prod(shape)
        held = self._work.get(name)
        if held is None or held.size < size or held.dtype != dtype:
            held = self._work[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def _with_ones(self, name: str, rows: Array, dtype: np.dtype[Any]) -> Array:
        """Copy keys or values, (tokens, dim), to (tokens, dim + 1) with ones in the last column."""
        result = self._buffer(name, (rows.shape[0], rows.shape[1] + 1), dtype)
        result[:, :-1] = rows
        result[:, -1] = 1
        return result

    def _query(self, rows: Array, dtype: np.dtype[Any]) -> Array:
        """Copy queries, (tokens, dim), to (dim + 1, tokens), scaled; the last row is the caller's to fill."""
        result = self._buffer("query", (rows.shape[1] + 1, rows.shape[0]), dtype)
        result[:-1] = rows.T
        result[:-1] *= self._scale(rows) * self.unit
        return result

    def _product(self, name: str, a: Array, b: Array) -> Array:
        # A BLAS may load what lies beyond small arrays, and report that as invalid; its results are right.
        with np.errstate(invalid="ignore"):
            return np.matmul(a, b, out=self._buffer(name, (a.shape[0], b.shape[1]), a.dtype))

    def _score(self, keys: Array, query: Array, with_slope: bool = False) -> tuple[Array, Array | None]:
        """Return a tile of scores less their rows' shifts, and the slope of the softcap there if asked for."""
        if self.softcap is None:
            return self._product("score", keys, query), None
        score = self._product("score", keys[:, :-1], query[:-1])
        np.tanh(score, out=score)
        slope = None
        if with_slope:
            slope = np.square(score, out=self._buffer("slope", score.shape, score.dtype))
            np.subtract(1, slope, out=slope)
        score *= self.softcap * LOG2E
        score += query[-1]
        return score, slope

    def _kept(self, batch: int, head: int, queries: Positions, keys: Positions, dtype: np.dtype[Any]) -> Array:
        """Return what dropout multiplies a tile of weights by: 0 or 1 / (1 - rate)."""
        assert self.dropout is not None
        kept = self.dropout.kept(batch, self.first_head + head, queries, keys)
        factor: Array = np.multiply(kept.T, 1 / (1 - self.dropout.rate), dtype=dtype)
        return factor

    def _shift(self, score: Array, query: Array, total: Array, visible: Array | None) -> None:
        """Move the rows' shifts (query's last row, negated) so that no score exceeds its shift by much.

        The online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), except that a shift stays
        until a score exceeds it by SLACK: any shift near the maximum gives the same result.
        """
        if visible is not None:
            np.copyto(score, -np.inf, where=~visible)
        fresh = total[-1] == 0  # no keys so far: the shift means nothing yet and may move either way
        if score.max() <= SLACK and not fresh.any():
            return
        rise = score.max(axis=0)
        rise = np.where(fresh & ~np.isneginf(rise), rise, np.maximum(rise, 0))
        score -= rise
        query[-1] -= rise
        total *= np.exp2(-np.maximum(rise, 0))

    def _exp2(self, score: Array, visible: Array | None, bounded: bool = False) -> None:
        """Replace scores by their weights: exp2, and exactly zero where not visible."""
        if not bounded:
            floor = FLOOR[score.itemsize]
            if visible is not None:  # what is hidden may be anything; keep it from overflowing
                np.minimum(score, SAFE, out=score)
            if not score.min() >= floor:
                np.maximum(score, floor, out=score)
        np.exp2(score, out=score)
        if visible is not None:
            score *= visible


def _longest(rows: Array) -> float:
    """Return the largest Euclidean norm of the rows, (tokens, dim)."""
    return math.sqrt(np.einsum("td,td->t", rows, rows).max(initial=0))
