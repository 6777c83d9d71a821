"""What scatter and gather are given: the same error on every rank, also where only one rank is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_connection import raises

from mpiattn import TensorParallelAttention, gather, scatter

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layout": "spiral"}, "unknown layout 'spiral'"),
    ({"layout": 5}, "unknown layout 5"),
    ({"layout": None}, "unknown layout None"),
    ({"root": 99}, "root is one of the"),
    ({"root": -1}, "root is one of the"),
    ({"root": "0"}, "root is one of the"),
    ({"axis": 2.5}, "axis is a whole number, got 2.5"),
    ({"axis": None}, "axis is a whole number, got None"),
]


@pytest.mark.mpi
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_no_argument(comm: Any, given: dict[str, Any], message: str, everywhere: bool) -> None:
    last = everywhere or comm.rank == comm.size - 1
    arguments = {"layout": "contiguous", **(given if last else {})}
    share = np.zeros((1, 2, 3, 4))
    raises(comm, lambda: scatter(share if comm.rank == 0 else None, comm, **arguments), message)
    raises(comm, lambda: gather(share, comm, **arguments), message)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"layout": "striped"}, {"layout": "zigzag"}),
        ({"root": 1}, {"root": 0}),
        ({"axis": 1}, {"axis": 2}),
        ({"layout": lambda shape, rank: (slice(None),)}, {"layout": "zigzag"}),
    ],
)
def test_arguments_that_differ(comm: Any, mine: dict[str, Any], others: dict[str, Any]) -> None:
    """Shares of the same shape would be in another order than their rank takes them for."""
    arguments = {"layout": "zigzag", **(mine if comm.rank == comm.size - 1 else others)}
    share = np.zeros((1, 2, 2, 4))
    message = f"{next(iter(mine))} is ", f" on rank {comm.size - 1} and ", " on rank 0: it must be the same"
    raises(comm, lambda: scatter(share, comm, **arguments), *message)
    raises(comm, lambda: gather(share, comm, **arguments), *message)


@pytest.mark.mpi
def test_the_layout_of_an_attention_that_shares_out_heads(comm: Any) -> None:
    """The error says what does instead, and that does."""
    whole = np.arange(48.0).reshape(1, 4, 3, 4)
    with TensorParallelAttention(comm) as attention:
        message = "shares out heads", "give scatter and gather attention.owned(name, shapes)"
        raises(comm, lambda: scatter(whole, comm, attention.layout), *message)
        raises(comm, lambda: gather(whole, comm, attention.layout), *message)
        where = attention.owned("q", {"q": whole.shape, "k": whole.shape})
        back = gather(scatter(whole, comm, where), comm, where, shape=whole.shape)
        assert back is None or np.array_equal(back, whole)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([1.0, 2.0], "a list: np.asarray makes an array of it"),
        (np.zeros((1, 2, 3, 4), ">f4"), "another byte order: array.astype('float32')"),
        (np.ma.masked_array(np.zeros((1, 2, 3, 4))), "a masked array"),
        (np.zeros((3, 4)), "with an axis 2"),
        (np.zeros((3, 4)), "float64 (3, 4)"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_such_array(comm: Any, array: Any, message: str) -> None:
    raises(comm, lambda: scatter(array, comm, "zigzag"), "rank 0 must give an array with an axis 2", message)
    share = array if comm.rank == comm.size - 1 else np.zeros((1, 2, 3, 4))
    raises(comm, lambda: gather(share, comm, "zigzag"), "must give an array with an axis 2", message)


@pytest.mark.mpi
def test_the_shape_of_the_whole(comm: Any) -> None:
    share = np.zeros((1, 2, 3, 4))
    raises(comm, lambda: gather(share, comm, "contiguous", shape=(1, 2)), "as many axes")
    whole = gather(share, comm, "contiguous", np.int64(0), np.array(2), [1, 2, np.int64(3 * comm.size), 4])  # type: ignore
    assert whole is None or whole.shape == (1, 2, 3 * comm.size, 4)
