"""Block attention on one rank in NumPy: forward and backward, tile by tile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiattn.arrays import accumulator
from mpiattn.arrays.softmax import merge
from mpiattn.problems.block import Block
from mpiattn.problems.dropout import Dropout

from ..contract import Progress, rows_of
from ..sums import Sums
from . import few, slices
from .scores import LOG2E, Form, form_of, shift, shift_raw, weigh
from .tiles import Plan, Tile, by_head, by_token, plan
from .work import Work

Array = NDArray[Any]

SMALL = 2**16  # pairs of a block whose plan is kept: to make it takes a tenth of the time of its attention
KEPT = 16  # plans: those of one rank's blocks in most runs, and little memory for a thousand virtual ranks


class NumpyKernel(Sums):
    """Attention of one rank's block: merged into a running (out, lse), or added to running gradients.

    Arrays are (batch, heads, tokens, head_dim) of float64, float32, float16 or bfloat16, contiguous or
    not. k and v may have fewer heads: query head h uses head h // (heads / kv_heads). What is computed
    and accumulated is `arrays.accumulator(dtype)`, float32 or float64; see `scores` for large scores. As in a
    textbook's 0 * NaN, a NaN in v reaches all rows of its tile, not only those that see it; one in q or k reaches the
    rows that see it.

    Parameters
    ----------
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) if not given.
    softcap : float, optional
        Scores are softcap * tanh(scale q k^T / softcap).
    """

    name = "numpy"

    def __init__(self, scale: float | None = None, softcap: float | None = None) -> None:
        self.scale = scale
        self.softcap = softcap
        self.dropout: Dropout | None = None
        self.first_head = 0
        self.work = Work()
        self.plans: dict[tuple[Block, int], Plan] = {}

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop probabilities from now on, or none, in arrays whose first query head has this number among all."""
        self.dropout, self.first_head = dropout, first_head

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Merge the attention of the block's queries to its keys into (out, lse), in place; see `contract.Kernel`.

        `progress` is called before each tile.
        """
        q, out, lse = rows_of(block, q, out, lse)
        plain = self.dropout is None and self.softcap is None
        if plain and few.fits(q, block) and few.attend(q, k, v, self._scale(q), out, lse):
            return
        group = q.shape[1] // k.shape[1]
        together, rows_of_tiles = self._plan(block, group)
        for b, g in np.ndindex(k.shape[:2]):
            form = self._form(q[b, g * group : (g + 1) * group], k[b, g])
            dtype = form.dtype
            keys = self.work.with_ones("keys", k[b, g], dtype)
            values = self.work.with_ones("values", v[b, g], dtype)
            key_factor = form.key_factor(keys)
            for first in range(g * group, (g + 1) * group, together):
                heads = slice(first, first + together)
                for rows, tiles in rows_of_tiles:
                    query = self.work.query(q[b, heads, rows], self._scale(q) * form.unit, dtype)
                    query[-1] = 0
                    query_factor, safe = form.query_factor(query), form.safe(query)
                    total = self.work.buffer("total", (values.shape[1], query.shape[1]), dtype)
                    total[...] = 0
                    for tile in tiles:
                        if progress:
                            progress()
                        seeing, sums = query[:, tile.queries], total[:, tile.queries]
                        factors = key_factor[tile.keys], query_factor[:, tile.queries]
                        score, _ = self._score(form, *factors, seeing[-1])
                        if not safe:
                            (shift_raw if form.raw else shift)(score, seeing, sums, tile.visible)
                        weigh(score, form, tile.visible, bounded=safe)
                        if self.dropout is None:
                            sums += self.work.product("part", values[tile.keys].T, score)
                        else:
                            sums[-1] += score.sum(axis=0)
                            score *= self._kept(b, heads, block, rows, tile, dtype)
                            sums[:-1] += self.work.product("part", values[tile.keys, :-1].T, score)
                    weight = total[-1]
                    with np.errstate(divide="ignore"):
                        part_lse = form.lse(weight, query[-1])
                    total[:-1] /= np.where(weight == 0, 1, weight)
                    merge(
                        out[b, heads, rows],
                        lse[b, heads, rows],
                        by_head(total[:-1].T, together),
                        by_head(part_lse, together),
                    )

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Add this block's share of the gradients to d_q, d_k and d_v, in place; see `contract.Kernel`."""
        q, d_out, lse, delta, d_q = rows_of(block, q, d_out, lse, delta, d_q)
        group = q.shape[1] // k.shape[1]
        together, rows_of_tiles = self._plan(block, group)
        for b, g in np.ndindex(k.shape[:2]):
            form = self._form(q[b, g * group : (g + 1) * group], k[b, g])
            dtype = form.dtype
            keys = self.work.with_ones("keys", k[b, g], dtype)
            values = self.work.with_ones("values", v[b, g], dtype)
            key_factor = form.key_factor(keys)
            d_keys = self.work.buffer("d_keys", k.shape[2:], dtype)
            d_keys[...] = 0
            for first in range(g * group, (g + 1) * group, together):
                heads = slice(first, first + together)
                for rows, tiles in rows_of_tiles:
                    query = self.work.query(q[b, heads, rows], self._scale(q) * form.unit, dtype)
                    own_lse = by_token(lse[b, heads, rows])
                    query[-1] = form.shift(own_lse)
                    query_factor = form.query_factor(query)
                    d_row = self.work.buffer("d_row", (values.shape[1], query.shape[1]), dtype)
                    d_row[:-1] = by_token(d_out[b, heads, rows]).T
                    d_row[-1] = -by_token(delta[b, heads, rows])
                    d_row[:, np.isneginf(own_lse)] = 0
                    d_query = self.work.buffer("d_query", (k.shape[3], query.shape[1]), dtype)
                    d_query[...] = 0
                    for tile in tiles:
                        if progress:
                            progress()
                        seeing, d_seeing = query[:, tile.queries], d_row[:, tile.queries]
                        factors = key_factor[tile.keys], query_factor[:, tile.queries]
                        weight, slope = self._score(form, *factors, seeing[-1], with_slope=True)
                        if form.raw:
                            weight += seeing[-1]
                        weigh(weight, form, tile.visible, top=0)
                        if self.dropout is None:
                            d_score = self.work.product("d_score", values[tile.keys], d_seeing)
                            d_score *= weight
                        else:
                            kept = self._kept(b, heads, block, rows, tile, dtype)
                            d_score = self.work.product("d_score", values[tile.keys, :-1], d_seeing[:-1])
                            d_score *= kept
                            d_score += d_seeing[-1]
                            d_score *= weight
                            weight *= kept
                        if slope is not None:
                            d_score *= slope
                        d_v[b, g, tile.keys] += self.work.product("part", weight, d_seeing[:-1].T)
                        d_keys[tile.keys] += self.work.product("part", d_score, seeing[:-1].T)
                        d_query[:, tile.queries] += self.work.product("part", keys[tile.keys, :-1].T, d_score)
                    d_query *= self._scale(q)
                    d_q[b, heads, rows] += by_head(d_query.T, together)
            d_keys /= form.unit  # `query` holds q * scale * unit
            d_k[b, g] += d_keys

    def _scale(self, q: Array) -> float:
        return 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale

    def _plan(self, block: Block, group: int) -> Plan:
        """Return the tiles of a block: of a small one, those that were made for it before."""
        if len(block.queries) * len(block.keys) > SMALL:
            return plan(block, group)
        if (block, group) not in self.plans:
            if len(self.plans) >= KEPT:
                self.plans.clear()
            self.plans[block, group] = plan(block, group)
        return self.plans[block, group]

    def _form(self, queries: Array, keys: Array) -> Form:
        return form_of(queries, keys, self._scale(queries), self.softcap, accumulator(queries.dtype))

    def _score(
        self, form: Form, keys: Array, query: Array, shift: Array, with_slope: bool = False
    ) -> tuple[Array, Array | None]:
        """Return a tile of scores, less their rows' shifts or raw, and the slope of the softcap there if asked for."""
        score = slices.product(keys, query) if form.sliced else self.work.product("score", keys, query)
        slope = None
        if self.softcap is None:
            return score, slope
        np.tanh(score, out=score)
        if with_slope:
            slope = np.square(score, out=self.work.buffer("slope", score.shape, score.dtype))
            np.subtract(1, slope, out=slope)
        score *= self.softcap * (1 if form.raw else LOG2E)
        if not form.raw:
            score += shift
        return score, slope

    def _kept(
        self, batch: int, heads: slice, block: Block, rows: slice, tile: Tile, dtype: np.dtype[np.generic]
    ) -> Array:
        """Return what dropout multiplies a tile of weights by: 0 or 1 / (1 - rate)."""
        assert self.dropout is not None
        together, (first, last) = heads.stop - heads.start, (tile.queries.start, tile.queries.stop)
        queries = block.queries[rows][first // together : last // together]
        factor = np.empty((tile.keys.stop - tile.keys.start, len(queries), together), dtype)
        for number in range(together):
            head = self.first_head + heads.start + number
            kept = self.dropout.kept(batch, head, queries, block.keys[tile.keys])
            np.multiply(kept.T, 1 / (1 - self.dropout.rate), out=factor[..., number])
        return factor.reshape(len(factor), -1)
