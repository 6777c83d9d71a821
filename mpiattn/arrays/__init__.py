"""Arrays of any kind: their functions, their dtypes, and kind, dtype and shape as integers.

Every array brings the namespace of its functions along (`__array_namespace__`, as in the Python array API
standard): NumPy's, CuPy's, or that of the arrays without data with which `virtual` runs an algorithm.

- `operations`: what differs between kinds beside that: `plain` for NumPy, `cupy` for CuPy
- `softmax`: the online-softmax state and its merge
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType
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
FLOAT_NAMES = tuple(dtype.name for dtype in FLOATS)

ELSEWHERE = "cupy (on another than the current device)"
CUPY = "cupy"
NAMESPACES = ("numpy", CUPY, "mpiattn.virtual.arrays", ELSEWHERE)
"""The kinds of arrays, by the name of their namespace."""

DESCRIPTION = 9
"""Integers in a description: kind, dtype, number of axes, up to six lengths."""


def namespace(array: Any) -> ModuleType:
    """Return the module of functions for arrays of this kind."""
    if type(array).__module__ == CUPY:  # has none
        return sys.modules[CUPY]
    xp: ModuleType = array.__array_namespace__()
    return xp


def accumulator(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype that partial sums of inputs of `dtype` are kept in: float32 or wider."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def gpus() -> list[str]:
    """Return the names of the GPUs that CuPy finds on this host."""
    if importlib.util.find_spec("cupy") is None:
        return []
    import cupy

    count = cupy.cuda.runtime.getDeviceCount() if cupy.is_available() else 0
    return [cupy.cuda.runtime.getDeviceProperties(number)["name"].decode() for number in range(count)]


def dtype(name: str) -> np.dtype[np.generic]:
    """Return the floating dtype of that name, or raise ValueError with the names there are."""
    for candidate in FLOATS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown dtype {name!r}: choose from {', '.join(FLOAT_NAMES)}")


def describe(array: Any) -> list[int]:
    """Return kind, dtype and shape as integers that one collective can carry; -1 where it is no such array."""
    try:
        known = _known(array)
    except Exception:  # of an object's own methods: the other ranks are to hear of it
        known = []
    return known + [-1] * (DESCRIPTION - len(known))


def _known(array: Any) -> list[int]:
    """Return kind, dtype, number of axes and lengths of an array; nothing of what is none."""
    brings = hasattr(array, "__array_namespace__") or type(array).__module__ == CUPY
    brings &= not isinstance(array, np.ma.MaskedArray)  # its mask would be left out
    kind = namespace(array).__name__ if brings else ""
    brings = kind != "numpy" or isinstance(array, np.ndarray | np.generic)  # others only lend NumPy's functions
    if kind == CUPY and array.device != namespace(array).cuda.Device():
        kind = ELSEWHERE
    if brings and kind in NAMESPACES and array.dtype in DTYPES and array.ndim <= DESCRIPTION - 3:
        return [NAMESPACES.index(kind), DTYPES.index(array.dtype), array.ndim, *array.shape]
    return []


def described(description: Iterable[int]) -> Spec | None:
    """Return shape and dtype from a description, or None where there was no array."""
    _, code, ndim, *shape = (int(number) for number in description)
    return None if code < 0 else (tuple(shape[:ndim]), DTYPES[code])


class Unfit:
    """A stand-in for a value that is no array and can't be made one."""

    def __init__(self, text: str) -> None:
        self.text = text


def told(value: Any) -> str:
    """Return what is wrong with a value that `describe` can't describe, and how to make an array of it that it can."""
    if isinstance(value, Unfit):
        return value.text
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if kind.__module__.partition(".")[0] == "torch":
        return "a tensor of torch: mpiattn.torch.attention takes it, or tensor.detach().numpy()"
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array: q.filled(0) makes an array of it, and a mask is given where the attention is built"
    if isinstance(value, (list, tuple)):
        return f"a {name}: np.asarray makes an array of it"
    if isinstance(value, np.ndarray):
        dtype = value.dtype
        if dtype.newbyteorder("=") in DTYPES:
            return f"an array of {dtype.name} in another byte order: array.astype({dtype.name!r}) puts it right"
        if value.ndim > DESCRIPTION - 3:
            return f"an array of {value.ndim} axes"
        return f"an array of {dtype.name}: array.astype(np.float32), or float64, makes one that can be sent"
    if hasattr(kind, "__array__") or hasattr(kind, "__dlpack__"):
        return f"a {name}: np.asarray makes an array of it that can be sent"
    return f"no array that can be sent, but {name}"
