"""Rows of numbers on a GPU: copied, gathered, added up, rounded and merged, by the fused passes."""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

from mpiattn.arrays.softmax import accumulator
from mpiattn.problems.mask import Positions

from .passes import Place, RowPass

Array = Any

# To prepare a pass takes longer than to queue it.
_prepared = functools.lru_cache(maxsize=2**12)(RowPass)


def _rows(name: str, wide: Any, dtype: Any, *arrays: Array) -> None:
    _prepared(name, wide, dtype, *map(Place.of, arrays))(*(array.data.ptr for array in arrays))


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
    for there, here in _runs(positions):
        copy(result[:, :, here], array[:, :, there])
    return result


def put(array: Array, positions: Positions, part: Array) -> None:
    """Set array[:, :, positions] to a part."""
    for there, here in _runs(positions):
        copy(array[:, :, there], part[:, :, here])


Runs = list[tuple[slice, slice]]
KEPT_RUNS = 256  # each with all its positions

_cut: dict[int, tuple[Positions, Runs]] = {}
"""Runs of positions, by their identity: to look at all of them takes longer than to copy what is there."""


def _runs(positions: Positions) -> Runs:
    """Cut positions into runs with even steps; return where each lies among all, and which of the given ones it has."""
    if id(positions) not in _cut:
        if len(_cut) == KEPT_RUNS:
            _cut.clear()
        result, begin = [], 0
        while begin < len(positions):
            steps = np.diff(positions[begin:])
            count = 1 if not len(steps) else 1 + int(np.argmin(np.append(steps == steps[0], False)))
            first, step = int(positions[begin]), int(steps[0]) if len(steps) else 1
            result.append((slice(first, first + (count - 1) * step + 1, step), slice(begin, begin + count)))
            begin += count
        _cut[id(positions)] = positions, result
    return _cut[id(positions)][1]


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
