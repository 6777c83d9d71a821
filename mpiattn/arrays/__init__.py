"""Arrays of any kind: their functions, their dtypes, and kind, dtype and shape as integers.

Every array brings the namespace of its functions along (`__array_namespace__`, as in the Python array API
standard): NumPy's, CuPy's, or that of the arrays without data with which `virtual` runs an algorithm. What CuPy has
no fast function for is in `arrays.cupy.rows`, which needs CuPy, and so is imported where there is such an array.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Spec = tuple[tuple[int, ...], Any]
"""Shape and dtype of an array."""

DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.bool_)
)
FLOATS = DTYPES[:4]

ELSEWHERE = "cupy (on another than the current device)"
NAMESPACES = ("numpy", "cupy", "mpiattn.virtual.arrays", ELSEWHERE)
"""The kinds of arrays, by the name of their namespace."""

DESCRIPTION = 9
"""Integers in a description: kind, dtype, number of axes, up to six lengths."""


def namespace(array: Any) -> Any:
    """Return the module of functions for arrays of this kind."""
    if type(array).__module__ == "cupy":  # has none
        return sys.modules["cupy"]
    return array.__array_namespace__()


def on_host(array: Any) -> Array:
    """Return the array if it is NumPy's, else a copy that is."""
    result: Array = array.get() if type(array).__module__ == "cupy" else array
    return result


def cast(array: Any, dtype: Any, result: Any = None) -> Any:
    """Return rows of numbers, an array of four axes, rounded to a dtype: a new array, or on a GPU one that is given."""
    if type(array).__module__ != "cupy":
        return array.astype(dtype)
    from .cupy import rows

    return rows.cast(array, dtype, result)


def take(array: Any, positions: Array) -> Any:
    """Return array[:, :, positions], for positions that ascend."""
    if type(array).__module__ != "cupy":
        return array[:, :, positions]
    from .cupy import rows

    return rows.take(array, positions)


def put(array: Any, positions: Array, part: Any) -> None:
    """Set array[:, :, positions] to a part, for positions that ascend."""
    if type(array).__module__ != "cupy":
        array[:, :, positions] = part
        return
    from .cupy import rows

    rows.put(array, positions, part)


def add(total: Any, share: Any) -> None:
    """Add rows of numbers, an array of four axes, to a sum of a dtype as wide or wider."""
    if type(share).__module__ == "cupy" and share.dtype != total.dtype:
        from .cupy import rows

        rows.accumulate(total, share)
    else:
        total += share


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
    brings = hasattr(array, "__array_namespace__") or type(array).__module__ == "cupy"
    kind = namespace(array).__name__ if brings else ""
    if kind == "cupy" and array.device != namespace(array).cuda.Device():
        kind = ELSEWHERE
    if kind in NAMESPACES and array.dtype in DTYPES and array.ndim <= DESCRIPTION - 3:
        description[:3] = NAMESPACES.index(kind), DTYPES.index(array.dtype), array.ndim
        description[3 : 3 + array.ndim] = array.shape
    return description


def described(description: NDArray[np.int64]) -> Spec | None:
    """Return shape and dtype from a description, or None where there was no array."""
    _, code, ndim, *shape = (int(number) for number in description)
    return None if code < 0 else (tuple(shape[:ndim]), DTYPES[code])
