"""Block attention on one rank in plain CuPy: matrix products and the fused passes of fused.cu.

Tiled, so that memory grows with the tokens and not with their square. A tile of scores is made by one
matrix product of many heads, turned into weights by one pass over it, and used by products with the
values, the gradients and the rest. Products are of the inputs' dtype, with sums in float32 at least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda.device import get_cublas_handle
from cupy_backends.cuda.libs import cublas
from numpy.typing import NDArray

from mpiattn.dropout import Dropout
from mpiattn.mask import Mask, Positions
from mpiattn.softmax import accumulator

from .sums import Sums

Array = Any
Progress = Callable[[], object]

QUERIES, KEYS = 2048, 4096  # the largest tile of one head
TILE_BYTES = 2**28  # of the scores of all heads of a tile
THREADS = 256
PACK = 8  # numbers that a thread of `packed_pass` has at a time
BLOCKS = 2112  # 16 for each of 132 multiprocessors; each goes on from row to row
PASSES = "merge", "accumulate", "copy", "cast", "delta", "stand_in"
TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


# Fused passes


@functools.cache
def _module(wide: str, dtype: str) -> Any:
    """Return the compiled passes for arrays of a dtype, with sums of another."""
    names = [f"{name}<{wide}, {dtype}, {v}>" for name in PASSES for v in (1, 2, 4)]
    names += [f"{name}<{wide}, {dtype}>" for name in ("softmax", "softmax_backward")]
    if wide != dtype:
        names += [
            f"{name}<{wide}, {dtype}, {PACK}, {arrived}, {result}>"
            for name in ("sum_parts", "merge_parts")
            for arrived in (wide, dtype)
            for result in (wide, dtype)
        ]
    source = files("mpiattn.kernels").joinpath("fused.cu").read_text()
    return cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=names)


@functools.cache
def _pass(name: str, wide: Any, dtype: Any, *more: Any) -> Any:
    """Return a pass; `more` are its numbers at a time, and further types."""
    a, t, *others = (str(x) if isinstance(x, int) else TYPES[np.dtype(x).name] for x in (wide, dtype, *more))
    return _module(a, t).get_function(f"{name}<{', '.join((a, t, *others))}>")


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
        rows = batch * heads * tokens
        vector = 16 // np.dtype(wide).itemsize
        self.strides = [[stride // array.itemsize for stride in array.strides[:3]] for array in arrays]
        for array, strides in zip(arrays, self.strides, strict=True):
            if array.ndim == 4:
                if array.strides[3] != array.itemsize and dim > 1 and rows:
                    raise ValueError("the numbers of a row must be neighbours in memory")
                if any(number % vector for number in (dim, *strides)) or array.data.ptr % (array.itemsize * vector):
                    vector = 1
        self.grid = (-(-rows * 32 // THREADS),)
        self.numbers = rows, heads, tokens, dim
        self.function = _pass(name, wide, dtype, vector) if rows else None

    def __call__(self, *pointers: int, more: Sequence[int] = ()) -> None:
        """Queue the pass; `more` are its last parameters."""
        if self.function is not None:
            arguments = [
                x for pointer, strides in zip(pointers, self.strides, strict=True) for x in (pointer, *strides)
            ]
            self.function(self.grid, (THREADS,), (*arguments, *self.numbers, *more))


def packed_pass(name: str, dtype: Any, arrived: Any, result: Array) -> Callable[..., None]:
    """Return a pass over sums of shares of a dtype; all its arrays are without gaps.

    Parameters
    ----------
    name : {"sum_parts", "merge_parts"}
    dtype, arrived : numpy dtype
        Of the shares, and of the sum that arrived.
    result : of four axes
        Its rows are multiples of PACK numbers.
    """
    batch, heads, tokens, dim = result.shape
    rows = batch * heads * tokens
    function = _pass(name, accumulator(dtype), dtype, PACK, arrived, result.dtype)
    block = dim // PACK, THREADS * PACK // dim
    grid = min(-(-rows // block[1]), BLOCKS)

    def queue(*pointers: int, more: Sequence[int]) -> None:
        function((grid,), block, (*pointers, rows, heads, tokens, dim, *more))

    return queue


def _rows(name: str, wide: Any, dtype: Any, *arrays: Array) -> None:
    RowPass(name, wide, dtype, *arrays)(*(array.data.ptr for array in arrays))


def merge(out: Array, lse: Array, other_out: Array, other_lse: Array) -> None:
    """Do `softmax.merge` in one pass; other_out may be of a narrower dtype. Arrays have all four, three axes."""
    _rows("merge", out.dtype, other_out.dtype, out, lse, other_out, other_lse)


def accumulate(total: Array, part: Array) -> None:
    """Add a part, which may be of a narrower dtype, to a sum of rows."""
    _rows("accumulate", total.dtype, part.dtype, total, part)


def copy(place: Array, array: Array) -> None:
    """Copy numbers; rows of four axes many at a time, which CuPy's own copy does not do with two bytes."""
    rows = place.ndim == 4 and place.dtype == array.dtype and place.shape == array.shape and place.size
    if rows and all(each.strides[3] == each.itemsize for each in (place, array)):
        _rows("copy", accumulator(place.dtype), place.dtype, place, array)
    else:
        place[...] = array


def take(array: Array, positions: Positions) -> Array:
    """Return array[:, :, positions]."""
    result = cupy.empty((*array.shape[:2], len(positions), *array.shape[3:]), array.dtype)
    for there, here in _runs(positions.tobytes()):
        copy(result[:, :, here], array[:, :, there])
    return result


def put(array: Array, positions: Positions, part: Array) -> None:
    """Set array[:, :, positions] to a part."""
    for there, here in _runs(positions.tobytes()):
        copy(array[:, :, there], part[:, :, here])


@functools.lru_cache(maxsize=256)
def _runs(positions: bytes) -> list[tuple[slice, slice]]:
    """Cut positions into runs with even steps; return where each lies among all, and which of the given ones it has."""
    numbers = np.frombuffer(positions, np.int64)
    result, begin = [], 0
    while begin < len(numbers):
        steps = np.diff(numbers[begin:])
        count = 1 if not len(steps) else 1 + int(np.argmin(np.append(steps == steps[0], False)))
        first, step = int(numbers[begin]), int(steps[0]) if len(steps) else 1
        result.append((slice(first, first + (count - 1) * step + 1, step), slice(begin, begin + count)))
        begin += count
    return result


def cast(total: Array, dtype: Any, result: Array | None = None) -> Array:
    """Round a sum of rows to a dtype."""
    if total.dtype == dtype:
        return total.copy()
    if result is None:
        result = cupy.empty(total.shape, dtype)
    _rows("cast", total.dtype, dtype, result, total)
    return result


def delta(d_out: Array, out: Array) -> Array:
    """Do `softmax.delta` in one pass."""
    d_out, out = _neighbours(d_out), _neighbours(out)
    result = cupy.empty(d_out.shape[:3], accumulator(d_out.dtype))
    _rows("delta", result.dtype, d_out.dtype, result, d_out, out)
    return result


def _neighbours(array: Array) -> Array:
    return array if array.strides[3] == array.itemsize else cupy.ascontiguousarray(array)


# Matrix products

CUBLAS = {  # data type, compute type
    "float64": (1, 70),
    "float32": (0, 68),
    "float16": (2, 68),
    "bfloat16": (14, 68),
}
DEFAULT_ALGORITHM = -1


def product(a: Array, b: Array, total: Array | None = None, factor: float = 1) -> Array:
    """Return factor * a @ b in float32 or wider, or add it to a total.

    Parameters
    ----------
    a, b : (count, rows, inner) and (count, inner, columns)
        Of one dtype; one of the last two axes contiguous, as in views with these axes swapped.
    total : (count, rows, columns), optional
        Rows contiguous.
    """
    count, rows, inner = a.shape
    columns = b.shape[2]
    wide = accumulator(a.dtype)
    result = cupy.empty((count, rows, columns), wide) if total is None else total
    if not result.size:
        return result
    if not inner:
        return result if total is not None else cupy.zeros_like(result)
    # Row by row is to cuBLAS the transpose, column by column: so it computes b^T a^T.
    data, compute = CUBLAS[np.dtype(a.dtype).name]
    transposed_b, step_b = _leading(b)
    transposed_a, step_a = _leading(a)
    alpha, beta = np.array(factor, wide), np.array(0 if total is None else 1, wide)
    strides = [array.strides[0] // array.itemsize for array in (a, b, result)]
    cublas.gemmStridedBatchedEx(
        get_cublas_handle(), transposed_b, transposed_a, columns, rows, inner, alpha.ctypes.data,
        b.data.ptr, data, step_b, strides[1], a.data.ptr, data, step_a, strides[0], beta.ctypes.data,
        result.data.ptr, CUBLAS[wide.name][0], _leading(result)[1], strides[2], count, compute, DEFAULT_ALGORITHM,
    )  # fmt: skip
    return result


def _leading(array: Array) -> tuple[int, int]:
    """Return whether the matrices' columns are contiguous, not their rows; and the step from one to the next."""
    _, rows, columns = array.shape
    _, by_row, by_column = (stride // array.itemsize for stride in array.strides)
    if columns == 1 or by_column == 1:
        return 0, max(by_row if rows > 1 else columns, columns)
    return 1, max(by_column, rows)


# The mask of a block


class Bounds(NamedTuple):
    """The run of keys [start, stop) that each query of a block sees, as indices; on the host and on the device."""

    positions: tuple[Positions, Positions]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    on_device: tuple[Array, Array, Array, Array]
    """start, stop and the positions."""


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
            both = q_positions, k_positions
            start_there, stop_there, queries, keys = map(cupy.asarray, (start, stop, *both))
            self.kept[key] = Bounds(both, start, stop, (start_there, stop_there, queries, keys))
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


class CupyKernel(Sums):
    """Attention of one rank's block on a GPU. Parameters, arrays and results: as `NumpyKernel`'s.

    Work is queued on the current stream; nothing waits for the device.
    """

    name = "cupy"

    def __init__(self, mask: Mask, scale: float | None = None, softcap: float | None = None) -> None:
        self.scale = scale
        self.softcap = softcap
        self.bounds = BoundsOf(mask)
        self.dropout: Dropout | None = None
        self.first_head = 0

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop probabilities from now on, or none: see `NumpyKernel.drop`."""
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
        """Merge the attention of q to this block's keys into (out, lse), in place: see `NumpyKernel.forward`."""
        group = q.shape[1] // k.shape[1]
        bounds = self.bounds(q_positions, k_positions)
        for tile in tiles(bounds, k.shape[1], group, lse.itemsize):
            heads = slice(tile.heads.start * group, tile.heads.stop * group)
            for b in range(q.shape[0]):
                query = _stacked(q[b, heads, tile.queries], group)
                key, value = (_readable(array[b, tile.heads, tile.keys]) for array in (k, v))
                score = product(query, key.swapaxes(1, 2))
                weight, part_lse = _narrow(score, q.dtype), cupy.empty(score.shape[:2], lse.dtype)
                self._softmax("softmax", tile, b, bounds, q, score, weight, part_lse)
                place = slice(b, b + 1), heads, tile.queries
                shape = out[place].shape
                part = product(weight, value).reshape(shape)
                merge(out[place], lse[place], part, part_lse.reshape(shape[:3]))
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
        group = q.shape[1] // k.shape[1]
        bounds, scale = self.bounds(q_positions, k_positions), self._scale(q)
        for tile in tiles(bounds, k.shape[1], group, lse.itemsize):
            heads = slice(tile.heads.start * group, tile.heads.stop * group)
            for b in range(q.shape[0]):
                query, gradient = (_stacked(array[b, heads, tile.queries], group) for array in (q, d_out))
                key, value = (_readable(array[b, tile.heads, tile.keys]) for array in (k, v))
                rows = [cupy.ascontiguousarray(row[b, heads, tile.queries]) for row in (lse, delta)]
                score, d_weight = product(query, key.swapaxes(1, 2)), product(gradient, value.swapaxes(1, 2))
                weight, d_score = _narrow(score, q.dtype), _narrow(d_weight, q.dtype)
                self._softmax("softmax_backward", tile, b, bounds, q, score, d_weight, weight, d_score, *rows)
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
        return float(1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale)

    def _softmax(
        self, name: str, tile: Tile, batch: int, bounds: Bounds, q: Array, score: Array, *arrays: Array
    ) -> None:
        """Run a pass over a tile of scores."""
        start, stop, queries, keys = bounds.on_device
        bound = start[tile.queries], stop[tile.queries]
        count, rows, columns = score.shape
        numbers: list[Any] = [tile.keys.start, len(bound[0]), columns, self._scale(q), float(self.softcap or 0)]
        if self.dropout is None:
            numbers += [0, 0, 0, 0, 1.0]
        else:
            seed = np.uint64(self.dropout.seed).view(np.int64)
            head = self.first_head + tile.heads.start * (rows // len(bound[0]))
            numbers += [int(self.dropout.rate * 2**32), int(seed), batch, head, 1 / (1 - self.dropout.rate)]
        numbers += [queries[tile.queries], keys[tile.keys]]
        _pass(name, score.dtype, q.dtype)((count * rows,), (THREADS,), (score, *arrays, *bound, *numbers))


def _narrow(array: Array, dtype: Any) -> Array:
    """Return an array of the shape and this dtype to be written: the same one, if that is its dtype."""
    return array if array.dtype == dtype else cupy.empty(array.shape, dtype)


def _readable(matrices: Array) -> Array:
    """Return the matrices, or a copy where their rows are not contiguous."""
    return matrices if matrices.strides[2] == matrices.itemsize else cupy.ascontiguousarray(matrices)


def _stacked(rows: Array, group: int) -> Array:
    """Return (heads, tokens, dim) as (kv_heads, group * tokens, dim), in place where there is nothing to stack."""
    heads, tokens, dim = rows.shape
    return _readable(rows) if group == 1 else cupy.ascontiguousarray(rows).reshape(heads // group, group * tokens, dim)
