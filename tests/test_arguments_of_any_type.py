"""Arguments of any type, on one rank or on all: the same error on every rank, and never Python's own on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from test_connection import raises

import mpiattn


class Odd:
    """An object that has no text."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def partition(self, separator: str) -> Any:
        raise KeyError(separator)


class LentNamespace:
    """An object with the functions of NumPy that is no array of NumPy's."""

    dtype, ndim, shape = np.dtype(np.float32), 4, (1, 2, 3, 4)

    def __array_namespace__(self) -> Any:
        return np


class Raising:
    """An object that raises whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __array_namespace__(self) -> Any:
        raise KeyError("numpy")


HUGE: Any = 10**5000  # Python refuses to write so many digits

VALUES: dict[str, Any] = {
    "number": 5,
    "list": ["zigzag"],
    "bytes": b"zigzag",
    "array": np.array(["a", "b"]),
    "odd": Odd(),
    "huge": HUGE,
}


@pytest.mark.mpi
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["layout", "mask", "scale", "softcap", "kernel", "partials", "gpu_messages"])
def test_options(comm: Any, name: str, value: Any, everywhere: bool) -> None:
    if name in ("scale", "softcap") and isinstance(value, int) and value == 5:
        value = "5"
    given = {name: value} if everywhere or comm.rank == comm.size - 1 else {}
    raises(comm, lambda: mpiattn.RingAttention(comm, **given), {"gpu_messages": "GPU messages"}.get(name, name))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda comm, value: mpiattn.MeshAttention(comm, rows=value), "grid"),
        (lambda comm, value: mpiattn.DoubleRingAttention(comm, outer=value), "grid"),
        (lambda comm, value: mpiattn.HybridAttention(comm, ulysses=value), "ulysses"),
    ],
)
def test_numbers_of_ranks(comm: Any, build: Callable[[Any, Any], Any], word: str) -> None:
    for value in (HUGE, -HUGE, Odd(), [1]):
        raises(comm, partial(build, comm, value if comm.rank == comm.size - 1 else 1), word)


def test_masks() -> None:
    assert mpiattn.SlidingWindow(HUGE) == mpiattn.SlidingWindow(float("inf"))
    for build in (mpiattn.SlidingWindow, lambda length: mpiattn.Documents([length])):
        with pytest.raises(mpiattn.InputError, match="0 or more"):
            build(-HUGE)


@pytest.mark.mpi
def test_a_document_of_any_length(comm: Any) -> None:
    array = np.zeros((1, 2, 3, 4), np.float32)
    attention = mpiattn.RingAttention(comm, mask=mpiattn.Documents([HUGE]), layout="contiguous")
    raises(comm, lambda: attention.forward(array, array, array), "the documents hold", "the sequence has")


@pytest.mark.mpi
@pytest.mark.parametrize(
    "value", [[[1], [2, 3]], "q", None, LentNamespace(), Raising()], ids=["ragged", "text", "none", "lent", "raising"]
)
@pytest.mark.parametrize("sinks", [None, np.zeros(2, np.float32), LentNamespace()], ids=["none", "sinks", "lent"])
def test_arrays(comm: Any, value: Any, sinks: Any) -> None:
    attention = mpiattn.RingAttention(comm)
    array = np.zeros((1, 2, 3, 4), np.float32)
    q = value if comm.rank == comm.size - 1 else array
    raises(comm, lambda: attention.forward(q, array, array, sinks=sinks), f"q on rank {comm.size - 1} is ")
