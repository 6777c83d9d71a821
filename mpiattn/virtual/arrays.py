"""Arrays without data: a shape and a dtype, and the storage that they keep alive.

This module is their namespace (`array.__array_namespace__()`). Each function that would touch memory moves the
clock of the rank that calls it instead, by the bytes it would read and write.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .clock import current

Index = Any
WHOLE = slice(None)


class HeldMemory:
    """Memory that a rank holds for as long as an array uses it."""

    __slots__ = ("nbytes", "rank")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.rank = nbytes, current()
        self.rank.allocate(nbytes)

    def __del__(self) -> None:
        self.rank.held -= self.nbytes


class VirtualArray:
    """Shape and dtype of an array, and the storage it keeps alive."""

    __slots__ = ("dtype", "nbytes", "ndim", "shape", "storage")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic], storage: HeldMemory) -> None:
        self.shape, self.dtype, self.storage = shape, dtype, storage
        self.nbytes, self.ndim = math.prod(shape) * dtype.itemsize, len(shape)

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return sys.modules[__name__]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> VirtualArray:
        if type(index) is tuple:  # all of it, as of a block that is not cut: told without making an array
            for entry in index:
                if type(entry) is not slice or entry != WHOLE:
                    break
            else:
                return self
        shape, copied = _indexed(self.shape, index)
        if not copied:
            return VirtualArray(shape, self.dtype, self.storage)
        result = empty(shape, self.dtype)
        current().touch(2 * result.nbytes)
        return result

    def __setitem__(self, index: Index, value: object) -> None:
        shape, _ = _indexed(self.shape, index)
        current().touch(2 * math.prod(shape) * self.dtype.itemsize)

    def view(self, dtype: DTypeLike) -> VirtualArray:
        """Return the same memory as another dtype, along the last axis."""
        kind = np.dtype(dtype)
        last = self.shape[-1] * self.dtype.itemsize // kind.itemsize
        return VirtualArray((*self.shape[:-1], last), kind, self.storage)

    def reshape(self, *shape: Any) -> VirtualArray:
        """Return the same memory in another shape."""
        lengths = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in lengths:
            rest = math.prod(length for length in lengths if length != -1)
            lengths = tuple(self.size // rest if length == -1 else length for length in lengths)
        if math.prod(lengths) != self.size:
            raise ValueError(f"cannot reshape {self.shape} into {lengths}")
        return VirtualArray(lengths, self.dtype, self.storage)

    def transpose(self, *axes: Any) -> VirtualArray:
        """Return the same memory with its axes in another order."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return VirtualArray(
            tuple(self.shape[axis] for axis in order or range(self.ndim)[::-1]), self.dtype, self.storage
        )

    def astype(self, dtype: DTypeLike, copy: bool = True) -> VirtualArray:
        """Return a copy in another dtype."""
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        result = empty(self.shape, dtype)
        current().touch(self.nbytes + result.nbytes)
        return result

    def copy(self) -> VirtualArray:
        """Return a copy."""
        return self.astype(self.dtype)

    def fill(self, value: float) -> None:
        """Write every element."""
        self.storage.rank.touch(self.nbytes)

    def max(self, initial: float) -> float:
        """Return what an array without elements does: one without data is in whatever state costs least to ask for."""
        return initial

    def _update(self, other: object) -> VirtualArray:
        self.storage.rank.touch(2 * self.nbytes + getattr(other, "nbytes", 0))
        return self

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _update

    def _combine(self, other: object) -> VirtualArray:
        return elementwise(self, other)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _combine

    def __neg__(self) -> VirtualArray:
        return elementwise(self)

    def sum(self, axis: int | tuple[int, ...]) -> VirtualArray:
        """Return an array without those axes."""
        gone = {number % self.ndim for number in ((axis,) if isinstance(axis, int) else axis)}
        result = empty([length for number, length in enumerate(self.shape) if number not in gone], self.dtype)
        current().touch(self.nbytes + result.nbytes)
        return result

    def __array_function__(self, function: Callable[..., object], types: object, args: Any, kwargs: Any) -> Any:
        """Stand in for the few NumPy functions that the algorithms call on arrays."""
        own = getattr(sys.modules[__name__], function.__name__, None)
        return NotImplemented if own is None else own(*args, **kwargs)


def _indexed(shape: tuple[int, ...], index: Index) -> tuple[tuple[int, ...], bool]:
    """Return the shape of array[index], and whether it is a copy (an index array) and no view."""
    result: list[int] = []
    axis, copied = 0, False
    entries = index if type(index) is tuple else (index,)
    for entry in entries:
        if type(entry) is slice:
            result.append(shape[axis] if entry == WHOLE else len(range(*entry.indices(shape[axis]))))
            axis += 1
        elif entry is None:
            result.append(1)
        elif entry is Ellipsis:
            left = len(shape) - sum(other is not None and other is not Ellipsis for other in entries)
            result += shape[axis : axis + left]
            axis += left
        elif isinstance(entry, (int, np.integer)):
            axis += 1
        else:
            result.append(int(np.count_nonzero(entry)) if np.asarray(entry).dtype == bool else len(entry))
            axis, copied = axis + 1, True
    return (*result, *shape[axis:]), copied


def empty(shape: int | Sequence[int], dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype."""
    kind = np.dtype(dtype)
    lengths = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(map(int, shape))
    return VirtualArray(lengths, kind, HeldMemory(math.prod(lengths) * kind.itemsize))


def full(shape: int | Sequence[int], value: float, dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype; writing it takes time."""
    result = empty(shape, dtype)
    result.fill(value)
    return result


def zeros(shape: int | Sequence[int], dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype; writing it takes time."""
    return full(shape, 0, dtype)


def ascontiguousarray(array: VirtualArray) -> VirtualArray:
    """Return the array."""
    return array


def shape(array: VirtualArray) -> tuple[int, ...]:
    """Return the shape."""
    return array.shape


def elementwise(*operands: object) -> VirtualArray:
    """Return an array for a number made of each element of all operands, in the widest of their dtypes."""
    arrays = [operand for operand in operands if isinstance(operand, VirtualArray)]
    widest = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    result = empty(np.broadcast_shapes(*(array.shape for array in arrays)), widest)
    current().touch(sum(array.nbytes for array in arrays) + result.nbytes)
    return result


exp = log = logaddexp = where = elementwise


def maximum(first: VirtualArray, second: VirtualArray, out: VirtualArray) -> None:
    """Write every element of `out`."""
    current().touch(first.nbytes + second.nbytes + out.nbytes)


def isneginf(array: VirtualArray) -> VirtualArray:
    """Return an array of booleans."""
    return empty(array.shape, np.bool_)


def einsum(subscripts: str, *operands: VirtualArray, dtype: DTypeLike | None = None) -> VirtualArray:
    """Return an array of the shape that the subscripts say."""
    inputs, output = subscripts.split("->")
    lengths: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        named = letters.replace("...", "")
        lengths.update(zip(named, operand.shape[operand.ndim - len(named) :], strict=True))
    letters, operand = inputs.split(",")[0], operands[0]
    batch = operand.shape[: operand.ndim - len(letters) + 3] if "..." in letters else ()
    result = empty((*batch, *(lengths[letter] for letter in output.replace("...", ""))), dtype or operand.dtype)
    current().touch(sum(array.nbytes for array in operands) + result.nbytes)
    return result
