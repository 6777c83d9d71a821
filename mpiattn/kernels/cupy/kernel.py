"""Block attention on one rank in plain CuPy, tile by tile.

A tile of scores is made by one matrix product of many heads, turned into weights by one pass over it, and
used by products with the values, the gradients and the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike

from mpiattn.arrays import accumulator
from mpiattn.arrays.cupy.passes import THREADS, compiled
from mpiattn.arrays.cupy.rows import merge, norms
from mpiattn.problems.block import Block
from mpiattn.problems.dropout import Dropout

from ..contract import Progress, rows_of
from ..sums import Sums
from .bounds import Bounds, BoundsOf
from .products import product
from .tiles import HeadTile, tiles

Array = Any


class CupyKernel(Sums):
    """Attention of one rank's block on a GPU; parameters as `NumpyKernel`'s.

    Work is queued on the current stream; nothing waits for the device. A scale is a number of float32, unless the
    arrays are float64.
    """

    name = "cupy"

    def __init__(self, scale: float | None = None, softcap: float | None = None) -> None:
        self.scale = scale
        self.softcap = softcap
        self.bounds = BoundsOf()
        self.dropout: Dropout | None = None
        self.first_head = 0

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop probabilities from now on, or none: see `NumpyKernel.drop`."""
        self.dropout, self.first_head = dropout, first_head

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Merge the attention of the block's queries to its keys into (out, lse), in place; see `contract.Kernel`."""
        q, out, lse = rows_of(block, q, out, lse)
        group = q.shape[1] // k.shape[1]
        bounds, longest = self.bounds(block), _norms(q, k)
        for tile in tiles(bounds, k.shape[1], group, accumulator(q.dtype).itemsize):
            heads = slice(tile.heads.start * group, tile.heads.stop * group)
            for b in range(q.shape[0]):
                query = _stacked(q[b, heads, tile.queries], group)
                key, value = (_readable(array[b, tile.heads, tile.keys]) for array in (k, v))
                score = product(query, key.swapaxes(1, 2))
                weight, part_lse = _narrow(score, q.dtype), cupy.empty(score.shape[:2], lse.dtype)
                factors = query, key, *(norm[b] for norm in longest)
                self._softmax("softmax", tile, b, bounds, factors, score, weight, part_lse)
                place = slice(b, b + 1), heads, tile.queries
                shape = out[place].shape
                part = product(weight, value).reshape(shape)
                merge(out[place], lse[place], part, part_lse.reshape(shape[:3]))
            if progress:
                progress()

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Add this block's share of the gradients to d_q, d_k and d_v, in place; see `contract.Kernel`."""
        q, d_out, lse, delta, d_q = rows_of(block, q, d_out, lse, delta, d_q)
        group = q.shape[1] // k.shape[1]
        bounds, scale, longest = self.bounds(block), self._scale(q), _norms(q, k)
        for tile in tiles(bounds, k.shape[1], group, accumulator(q.dtype).itemsize):
            heads = slice(tile.heads.start * group, tile.heads.stop * group)
            for b in range(q.shape[0]):
                query, gradient = (_stacked(array[b, heads, tile.queries], group) for array in (q, d_out))
                key, value = (_readable(array[b, tile.heads, tile.keys]) for array in (k, v))
                rows = [cupy.ascontiguousarray(row[b, heads, tile.queries]) for row in (lse, delta)]
                score, d_weight = product(query, key.swapaxes(1, 2)), product(gradient, value.swapaxes(1, 2))
                weight, d_score = _narrow(score, q.dtype), _narrow(d_weight, q.dtype)
                factors = query, key, *(norm[b] for norm in longest)
                self._softmax("softmax_backward", tile, b, bounds, factors, score, d_weight, weight, d_score, *rows)
                product(weight.swapaxes(1, 2), gradient, d_v[b, tile.heads, tile.keys])
                product(d_score.swapaxes(1, 2), query, d_k[b, tile.heads, tile.keys], scale)
                share = d_q[b, heads, tile.queries]
                if group == 1:
                    product(d_score, key, share, scale)
                else:
                    share += product(d_score, key, factor=scale).reshape(share.shape)
            if progress:
                progress()

    def _scale(self, q: Array) -> float:
        return float(1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale)

    def _softmax(
        self, name: str, tile: HeadTile, batch: int, bounds: Bounds, factors: Sequence[Array], score: Array,
        *arrays: Array,
    ) -> None:  # fmt: skip
        """Run a pass over a tile of scores, the product of these queries and keys; of whose norms, see `_norms`."""
        query, key, query_norms, key_norms = factors
        group, dim = query.shape[1] // (tile.queries.stop - tile.queries.start), query.shape[2]
        heads = slice(tile.heads.start * group, tile.heads.stop * group)
        near = cupy.ascontiguousarray(query_norms[heads, tile.queries]), key_norms[tile.heads]
        steps = [[stride // array.itemsize for stride in array.strides[:2]] for array in (query, key)]
        start, stop, queries, keys = bounds.on_device
        bound = start[tile.queries], stop[tile.queries]
        count, rows, columns = score.shape
        numbers: list[Any] = [tile.keys.start, len(bound[0]), columns, self._scale(query), float(self.softcap or 0)]
        numbers += [query, *steps[0], key, *steps[1], rows, dim, *near]
        if self.dropout is None:
            numbers += [0, 0, 0, 0, 1.0]
        else:
            seed = np.uint64(self.dropout.seed).view(np.int64)
            head = self.first_head + tile.heads.start * (rows // len(bound[0]))
            numbers += [int(self.dropout.rate * 2**32), int(seed), batch, head, 1 / (1 - self.dropout.rate)]
        numbers += [queries[tile.queries], keys[tile.keys]]
        compiled(name, score.dtype, query.dtype)((count * rows,), (THREADS,), (score, *arrays, *bound, *numbers))


def _norms(q: Array, k: Array) -> list[Array]:
    """Return the norm of each query, (batch, heads, tokens), and that of the longest key, (batch, kv_heads).

    They bound the scores: rows that may have large ones get them in float64, see `fused.cu`.
    """
    return [norms(q), norms(k).max(axis=2) if k.size else cupy.zeros(k.shape[:2])]


def _narrow(array: Array, dtype: DTypeLike) -> Array:
    """Return an array of the shape and this dtype to be written: the same one, if that is its dtype."""
    return array if array.dtype == dtype else cupy.empty(array.shape, dtype)


def _readable(matrices: Array) -> Array:
    """Return the matrices, or a copy where their rows are not contiguous."""
    return matrices if matrices.strides[2] == matrices.itemsize else cupy.ascontiguousarray(matrices)


def _stacked(rows: Array, group: int) -> Array:
    """Return (heads, tokens, dim) as (kv_heads, group * tokens, dim), in place where there is nothing to stack."""
    heads, tokens, dim = rows.shape
    return _readable(rows) if group == 1 else cupy.ascontiguousarray(rows).reshape(heads // group, group * tokens, dim)
