"""Matrix products of many heads at a time, by cuBLAS: of the inputs' dtype, with sums in float32 at least."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
from cupy.cuda.device import get_cublas_handle
from cupy_backends.cuda.libs import cublas

from mpiattn.arrays import accumulator

Array = Any

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
