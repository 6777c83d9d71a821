"""Block attention on one rank in plain CuPy: matrix products and the fused passes of fused.cu.

Tiled, so that memory grows with the tokens and not with their square. A tile of scores is made by one
matrix product of many heads, turned into weights in place by one pass over it, and used by one product
with the values. Half-precision inputs are widened to float32 and multiplied in TensorFloat-32, which holds
their every bit; float32 and float64 inputs are multiplied as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy._core import _routines_linalg as linalg
from cupy._core import get_compute_type, set_compute_type
from numpy.typing import NDArray

from mpiattn.mask import Mask, Positions
from mpiattn.softmax import accumulator

Array = Any
Progress = Callable[[], object]

QUERIES, KEYS = 1024, 4096  # the largest tile of one head
TILE_BYTES = 2**26  # of the scores of all heads of a tile
THREADS = 256
TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


# Fused passes


@functools.cache
def _module(wide: str, dtype: str) -> Any:
    """Return the compiled passes for arrays of a dtype, with sums of another."""
    names = [
        f"{name}<{wide}, {dtype}, {v}>" for name in ("merge", "accumulate", "delta", "stand_in") for v in (1, 2, 4)
    ]
    names += [f"{name}<{wide}>" for name in ("softmax", "softmax_backward")]
    source = files("mpiattn.kernels").joinpath("fused.cu").read_text()
    return cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=names)


@functools.cache
def _pass(name: str, wide: Any, dtype: Any, *vector: int) -> Any:
    a, t = TYPES[np.dtype(wide).name], TYPES[np.dtype(dtype).name]
    parameters = f"{a}, {t}, {vector[0]}" if vector else a
    return _module(a, t).get_function(f"{name}<{parameters}>")


class RowPass:
    """A pass with one warp a row, prepared for arrays of some shapes and strides, to be run on any pointers.

    Parameters
    ----------
    name : str
        In fused.cu.
    wide, dtype : numpy dtype
        Of sums, and of the narrower arrays.
    arrays : of four axes or three, in the order of the pass's parameters
        The first one of four axes says which rows there are.
    """

    def __init__(self, name: str, wide: Any, dtype: Any, *arrays: Array) -> None:
        batch, heads, tokens, dim = next(array.shape for array in arrays if array.ndim == 4)
        vector = 16 // np.dtype(wide).itemsize
        self.strides = [[stride // array.itemsize for stride in array.strides[:3]] for array in arrays]
        for array, strides in zip(arrays, self.strides, strict=True):
            if array.ndim == 4:
                if array.strides[3] != array.itemsize and dim > 1:
                    raise ValueError("the numbers of a row must be neighbours in memory")
                if any(number % vector for number in (dim, *strides)) or array.data.ptr % (array.itemsize * vector):
                    vector = 1
        rows = batch * heads * tokens
        self.grid = (-(-rows * 32 // THREADS),)
        self.numbers = rows, heads, tokens, dim
        self.function = _pass(name, wide, dtype, vector) if rows else None

    def __call__(self, *pointers: int) -> None:
        """Queue the pass."""
        if self.function is not None:
            arguments = [
                x for pointer, strides in zip(pointers, self.strides, strict=True) for x in (pointer, *strides)
            ]
            self.function(self.grid, (THREADS,), (*arguments, *self.numbers))


def _rows(name: str, wide: Any, dtype: Any, *arrays: Array) -> None:
    RowPass(name, wide, dtype, *arrays)(*(array.data.ptr for array in arrays))


def merge(out: Array, lse: Array, other_out: Array, other_lse: Array) -> None:
    """Do `softmax.merge` in one pass; other_out may be of a narrower dtype. Arrays have all four, three axes."""
    _rows("merge", out.dtype, other_out.dtype, out, lse, other_out, other_lse)


def accumulate(total: Array, part: Array) -> None:
    """Add a part, which may be of a narrower dtype, to a sum of rows."""
    _rows("accumulate", total.dtype, part.dtype, total, part)


def delta(d_out: Array, out: Array) -> Array:
    """Do `softmax.delta` in one pass."""
    d_out, out = _neighbours(d_out), _neighbours(out)
    result = cupy.empty(d_out.shape[:3], accumulator(d_out.dtype))
    _rows("delta", result.dtype, d_out.dtype, result, d_out, out)
    return result


def _neighbours(array: Array) -> Array:
    return array if array.strides[3] == array.itemsize else cupy.ascontiguousarray(array)


# The mask of a block


class Bounds(NamedTuple):
    """The run of keys [start, stop) that each query of a block sees, as indices; on the host and on the device."""

    positions: tuple[Positions, Positions]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    on_device: tuple[Array, Array]


class BoundsOf:
    """The bounds of a mask in blocks; those of the last ones are kept."""

    KEPT = 1024

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.kept: dict[tuple[int, int], Bounds] = {}

    def __call__(self, q_positions: Positions, k_positions: Positions) -> Bounds:
        """Return the bounds of queries and keys at these positions."""
        key = id(q_positions), id(k_positions)  # `Bounds` holds both, so neither number is given to another array
        if key not in self.kept:
            if len(self.kept) == self.KEPT:
                self.kept.clear()
            lo, hi = self.mask.bounds(q_positions)
            start, stop = (np.searchsorted(k_positions, bound).astype(np.int32) for bound in (lo, hi))
            on_device = cupy.asarray(start), cupy.asarray(stop)
            self.kept[key] = Bounds((q_positions, k_positions), start, stop, on_device)
        return self.kept[key]


class Tile(NamedTuple):
    """Some heads of K/V, the queries of their groups, and keys that some of the queries see."""

    heads: slice
    queries: slice
    keys: slice


def tiles(bounds: Bounds, kv_heads: int, group: int, itemsize: int) -> Iterator[Tile]:
    """Yield the tiles that cover a block, leaving out what no query sees."""
    for queries in _cut(0, len(bounds.start), QUERIES):
        start, stop = bounds.start[queries], bounds.stop[queries]
        some = start < stop
        if some.any():
            for keys in _cut(int(start[some].min()), int(stop[some].max()), KEYS):
                size = (queries.stop - queries.start) * (keys.stop - keys.start) * group * itemsize
                for heads in _cut(0, kv_heads, max(TILE_BYTES // size, 1)):
                    yield Tile(heads, queries, keys)


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Cut [begin, end) into the fewest slices of at most `size`, as even as can be."""
    count = -(-(end - begin) // size)
    edges = [begin + (end - begin) * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]


@contextmanager
def products_of(dtype: Any) -> Iterator[None]:
    """Multiply widened half-precision numbers in TensorFloat-32."""
    before = get_compute_type(np.float32)
    if np.dtype(dtype).itemsize == 2:
        set_compute_type(np.float32, linalg.COMPUTE_TYPE_TF32)
    try:
        yield
    finally:
        set_compute_type(np.float32, before)


class CupyKernel:
    """Attention of one rank's block on a GPU. Parameters, arrays and results: as `NumpyKernel`'s.

    Work is queued on the current stream; nothing waits for the device.
    """

    name = "cupy"

    def __init__(self, mask: Mask, scale: float | None = None) -> None:
        self.scale = scale
        self.bounds = BoundsOf(mask)

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
        """Merge the attention of q to this block's keys into (out, lse), in place: see `NumpyKernel.forward`."""
        wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
        bounds = self.bounds(q_positions, k_positions)
        with products_of(q.dtype):
            for tile in tiles(bounds, k.shape[1], group, wide.itemsize):
                heads = slice(tile.heads.start * group, tile.heads.stop * group)
                for b in range(q.shape[0]):
                    query = _stacked(q[b, heads, tile.queries], group, wide)
                    key, value = (array[b, tile.heads, tile.keys].astype(wide) for array in (k, v))
                    score = cupy.matmul(query, key.swapaxes(1, 2))
                    part_lse = self._softmax("softmax", tile, bounds, q, score, cupy.empty(score.shape[:2], wide))
                    part = cupy.matmul(score, value)
                    place = slice(b, b + 1), heads, tile.queries
                    shape = out[place].shape
                    merge(out[place], lse[place], part.reshape(shape), part_lse.reshape(shape[:3]))
                if progress:
                    progress()

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
        """Add this block's share of the gradients to d_q, d_k and d_v, in place: see `NumpyKernel.backward`."""
        wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
        bounds = self.bounds(q_positions, k_positions)
        with products_of(q.dtype):
            for tile in tiles(bounds, k.shape[1], group, wide.itemsize):
                heads = slice(tile.heads.start * group, tile.heads.stop * group)
                for b in range(q.shape[0]):
                    query, gradient = (_stacked(array[b, heads, tile.queries], group, wide) for array in (q, d_out))
                    key, value = (array[b, tile.heads, tile.keys].astype(wide) for array in (k, v))
                    rows = [cupy.ascontiguousarray(row[b, heads, tile.queries]) for row in (lse, delta)]
                    score = cupy.matmul(query, key.swapaxes(1, 2))
                    d_score = cupy.matmul(gradient, value.swapaxes(1, 2))
                    self._softmax("softmax_backward", tile, bounds, q, score, d_score, *rows)
                    d_v[b, tile.heads, tile.keys] += cupy.matmul(score.swapaxes(1, 2), gradient)
                    d_k[b, tile.heads, tile.keys] += cupy.matmul(d_score.swapaxes(1, 2), query)
                    place = b, heads, tile.queries
                    d_q[place] += cupy.matmul(d_score, key).reshape(d_q[place].shape)
                if progress:
                    progress()

    def _softmax(self, name: str, tile: Tile, bounds: Bounds, q: Array, score: Array, *arrays: Array) -> Array:
        """Run a pass over a tile of scores; return the first of the other arrays."""
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        start, stop = (bound[tile.queries] for bound in bounds.on_device)
        numbers = tile.keys.start, len(start), score.shape[2], float(scale)
        rows = score.shape[0] * score.shape[1]
        _pass(name, score.dtype, q.dtype)((rows,), (THREADS,), (score, *arrays, start, stop, *numbers))
        return arrays[0]


def _stacked(rows: Array, group: int, dtype: Any) -> Array:
    """Copy (heads, tokens, dim) to (kv_heads, group * tokens, dim)."""
    heads, tokens, dim = rows.shape
    copy = cupy.ascontiguousarray(rows.astype(dtype))
    return copy.reshape(heads // group, group * tokens, dim)
