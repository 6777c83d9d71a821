"""The passes over memory of fused.cu: compiled when they are first used, and queued on the current stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import cupy
import numpy as np

from mpiattn.arrays import accumulator

from .place import VECTOR, Place

Array = Any

THREADS = 256
PACK = 8  # numbers that a thread of `packed_pass` has at a time
BLOCKS = 2112  # 16 for each of 132 multiprocessors; each goes on from row to row
PASSES = "merge", "accumulate", "copy", "cast", "delta", "norm", "stand_in"
TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


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
    source = files("mpiattn.arrays.cupy").joinpath("fused.cu").read_text()
    return cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=names)


@functools.cache
def compiled(
    name: str, wide: np.dtype[np.generic], dtype: np.dtype[np.generic], *more: int | np.dtype[np.generic]
) -> Any:
    """Return a pass; `more` are its numbers at a time, and further types."""
    a, t, *others = (str(x) if isinstance(x, int) else TYPES[np.dtype(x).name] for x in (wide, dtype, *more))
    return _module(a, t).get_function(f"{name}<{', '.join((a, t, *others))}>")


class RowPass:
    """A pass with one warp a row, prepared for arrays in some places, to be run on any pointers.

    Parameters
    ----------
    name : str
        In fused.cu.
    wide, dtype : numpy dtype
        Of sums, and of the narrower arrays.
    places : of arrays of four axes or three, in the order of the pass's parameters
        The first one of four axes says which rows there are.
    """

    def __init__(self, name: str, wide: np.dtype[np.generic], dtype: np.dtype[np.generic], *places: Place) -> None:
        batch, heads, tokens, dim = next(place.shape for place in places if len(place.shape) == 4)
        rows = batch * heads * tokens
        vector = VECTOR // np.dtype(wide).itemsize
        self.strides = [place.steps[:3] for place in places]
        for place, strides in zip(places, self.strides, strict=True):
            if len(place.shape) == 4:
                if place.steps[3] != 1 and dim > 1 and rows:
                    raise ValueError("the numbers of a row must be neighbours in memory")
                if any(number % vector for number in (dim, *strides)) or not place.aligned:
                    vector = 1
        self.grid = (-(-rows * 32 // THREADS),)
        self.numbers = rows, heads, tokens, dim
        self.function = compiled(name, wide, dtype, vector) if rows else None

    def __call__(self, *pointers: int, more: Sequence[int] = ()) -> None:
        """Queue the pass; `more` are its last parameters."""
        if self.function is not None:
            arguments = [
                x for pointer, strides in zip(pointers, self.strides, strict=True) for x in (pointer, *strides)
            ]
            self.function(self.grid, (THREADS,), (*arguments, *self.numbers, *more))


def packed_pass(
    name: str, dtype: np.dtype[np.generic], arrived: np.dtype[np.generic], result: Array
) -> Callable[..., None]:
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
    function = compiled(name, accumulator(dtype), dtype, PACK, arrived, result.dtype)
    block = dim // PACK, THREADS * PACK // dim
    grid = min(-(-rows // block[1]), BLOCKS)

    def queue(*pointers: int, more: Sequence[int]) -> None:
        function((grid,), block, (*pointers, rows, heads, tokens, dim, *more))

    return queue
