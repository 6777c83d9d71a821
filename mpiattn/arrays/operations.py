"""Operations on rows of numbers, for each kind of arrays: chosen here, once, by the namespace of the arrays."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from . import CUPY, Array, namespace
from .places import Places


class Operations(Protocol):
    """Functions that differ between kinds of arrays; the modules `plain` and `cupy.rows` are two."""

    QUEUED: bool
    """Whether work on arrays is queued, and done later than it is called."""

    def on_host(self, array: Array, /) -> Array:
        """Return the array if it is NumPy's, else a copy that is."""
        ...

    def copy(self, place: Array, array: Array, /) -> None:
        """Copy numbers to a place of the same shape, rounded where its dtype is narrower."""
        ...

    def cast(self, array: Array, dtype: DTypeLike, /) -> Array:
        """Return an array of four axes, rounded to a dtype: a new array."""
        ...

    def add(self, total: Array, share: Array, /) -> None:
        """Add an array of four axes to a sum of a dtype as wide or wider."""
        ...

    def take(self, array: Array, places: Places, /) -> Array:
        """Return array[:, :, places]."""
        ...

    def put(self, array: Array, places: Places, part: Array, /) -> None:
        """Set array[:, :, places] to a part."""
        ...

    def merge(self, out: Array, lse: Array, other_out: Array, other_lse: Array, /) -> None:
        """Merge another partial result: see `softmax.merge`."""
        ...

    def delta(self, d_out: Array, out: Array, /) -> Array:
        """Return rowsum(d_out * out): see `softmax.delta`."""
        ...


def of(xp: ModuleType) -> Operations:
    """Return the operations on the arrays of a namespace."""
    return _named(xp.__name__)


@functools.cache
def _named(name: str) -> Operations:
    if name == CUPY:
        from .cupy import rows

        return rows
    from . import plain

    return plain


def operations(array: Array) -> Operations:
    """Return the operations on an array."""
    return of(np) if type(array) is np.ndarray else of(namespace(array))


def on_host(array: Array) -> Array:
    """Return the array if it is NumPy's, else a copy that is."""
    return operations(array).on_host(array)


def cast(array: Array, dtype: DTypeLike) -> Array:
    """Return an array of four axes, rounded to a dtype: a new array."""
    return operations(array).cast(array, dtype)


def take(array: Array, places: Places) -> Array:
    """Return array[:, :, places]."""
    return operations(array).take(array, places)
