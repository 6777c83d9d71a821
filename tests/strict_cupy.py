"""CuPy's arrays without a GPU: NumPy's numbers with CuPy's manners, for tests on CPUs of code that serves both.

As there, an array becomes NumPy's only where `get` or `asnumpy` asks for it, and the two kinds do not mix; numbers and
indices of NumPy's may be used with both. Functions and methods are those of NumPy's names.
"""

from __future__ import annotations

import functools
import importlib.machinery
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


class ndarray:
    """An array of CuPy's; its class is named as there."""

    __array_ufunc__ = None  # NumPy's arrays leave operators to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def get(self) -> Any:
        return self.inside.copy()

    def __array__(self, *_: object, **__: object) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed: use get")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):
            raise AttributeError(name)
        found = getattr(self.inside, name)
        return called(found) if callable(found) else wrapped(found)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.inside)

    def __float__(self) -> float:
        return float(self.inside)

    def __int__(self) -> int:
        return int(self.inside)

    def __bool__(self) -> bool:
        return bool(self.inside)

    def __getitem__(self, places: Any) -> Any:
        return wrapped(self.inside[index(places)])

    def __setitem__(self, places: Any, value: Any) -> None:
        self.inside[index(places)] = plain(value)


def operator(name: str) -> Callable[..., Any]:
    def apply(self: ndarray, *others: Any) -> Any:
        result = getattr(np.ndarray, name)(self.inside, *map(plain, others))
        return self if name.startswith("__i") and name != "__invert__" else wrapped(result)

    return apply


BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
for name in [
    *BINARY,
    *(f"i{each}" for each in BINARY),
    *(f"r{each}" for each in BINARY),
    *["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"],
]:
    setattr(ndarray, f"__{name}__", operator(f"__{name}__"))
ndarray.__module__ = "cupy"


def plain(value: Any) -> Any:
    """Return what NumPy computes with: no array of NumPy's own may be given."""
    if isinstance(value, ndarray):
        return value.inside
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def index(places: Any) -> Any:
    """Return places for NumPy, which may be NumPy's arrays, too."""
    if isinstance(places, tuple):
        return tuple(map(index, places))
    return places.inside if isinstance(places, ndarray) else places


def wrapped(result: Any) -> Any:
    """Return arrays and NumPy's scalars, which CuPy has on the GPU, as this module's."""
    if isinstance(result, (list, tuple)) and any(isinstance(each, np.ndarray) for each in result):
        return type(result)(map(wrapped, result))
    return ndarray(np.asarray(result)) if isinstance(result, (np.ndarray, np.generic)) else result


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of this module's arrays."""

    @functools.wraps(function, updated=())
    def call(*given: Any, **named: Any) -> Any:
        return wrapped(function(*map(plain, given), **{name: plain(value) for name, value in named.items()}))

    return call


class Module(ModuleType):
    """The module: NumPy's functions, for its arrays alone."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__spec__ = importlib.machinery.ModuleSpec("cupy", None)

    @staticmethod
    def asarray(array: Any, dtype: Any = None) -> ndarray:
        return ndarray(np.array(array.inside if isinstance(array, ndarray) else array, dtype))

    @staticmethod
    def asnumpy(array: ndarray) -> Any:
        return array.get()

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, np.ufunc):
            function = called(found)
            function.at = called(found.at)  # type: ignore[attr-defined]
            return function
        return called(found) if callable(found) and not isinstance(found, type) else found


class Rows:
    """What `arrays.operations` offers of it."""

    QUEUED = True

    @staticmethod
    def on_host(array: Any) -> Any:
        return array.get()
