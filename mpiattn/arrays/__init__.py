"""Arrays of any kind: their functions, their dtypes, and kind, dtype and shape as integers.

Every array brings the namespace of its functions along (`__array_namespace__`, as in the Python array API
standard): NumPy's, CuPy's, or that of the arrays without data with which `virtual` runs an algorithm.

- `operations`: what differs between kinds beside that: `plain` for NumPy, `cupy` for CuPy
- `softmax`: the online-softmax state and its merge
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Spec = tuple[tuple[int, ...], Any]
"""Shape and dtype of an array."""

DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.bool_)
)
FLOATS = DTYPES[:4]

ELSEWHERE = "cupy (on another than the current device)"
CUPY = "cupy"
NAMESPACES = ("numpy", CUPY, "mpiattn.virtual.arrays", ELSEWHERE)
"""The kinds of arrays, by the name of their namespace."""

DESCRIPTION = 9
"""Integers in a description: kind, dtype, number of axes, up to six lengths."""


def namespace(array: Any) -> Any:
    """Return the module of functions for arrays of this kind."""
    if type(array).__module__ == CUPY:  # has none
        return sys.modules[CUPY]
    return array.__array_namespace__()


def accumulator(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype that partial sums of inputs of `dtype` are kept in: float32 or wider."""
    return np.result_type(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def gpus() -> list[str]:
    """Return the names of the GPUs that CuPy finds on this host."""
    if importlib.util.find_spec("cupy") is None:
        return []
    import cupy

    count = cupy.cuda.runtime.getDeviceCount() if cupy.is_available() else 0
    return [cupy.cuda.runtime.getDeviceProperties(number)["name"].decode() for number in range(count)]


def dtype(name: str) -> np.dtype[Any]:
    """Return the floating dtype of that name, or raise ValueError with the names there are."""
    for candidate in FLOATS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown dtype {name!r}: choose from {', '.join(d.name for d in FLOATS)}")


def describe(array: Any) -> NDArray[np.int64]:
    """Return kind, dtype and shape as integers that one collective can carry; -1 where it is no such array."""
    description = np.full(DESCRIPTION, -1, dtype=np.int64)
    brings = hasattr(array, "__array_namespace__") or type(array).__module__ == CUPY
    kind = namespace(array).__name__ if brings else ""
    if kind == CUPY and array.device != namespace(array).cuda.Device():
        kind = ELSEWHERE
    if kind in NAMESPACES and array.dtype in DTYPES and array.ndim <= DESCRIPTION - 3:
        description[:3] = NAMESPACES.index(kind), DTYPES.index(array.dtype), array.ndim
        description[3 : 3 + array.ndim] = array.shape
    return description


def described(description: NDArray[np.int64]) -> Spec | None:
    """Return shape and dtype from a description, or None where there was no array."""
    _, code, ndim, *shape = (int(number) for number in description)
    return None if code < 0 else (tuple(shape[:ndim]), DTYPES[code])
