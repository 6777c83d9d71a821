"""Bytes and messages of all-gather, Ulysses and the hybrid, as the papers count them, and what is saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpiattn
from mpiattn import ALGORITHMS
from mpiattn.algorithms import hybrid
from mpiattn.trace.comm import TracedComm

NAMES = ("allgather", "ulysses", "hybrid", "tensor_parallel")


def received(comm: Any, name: str, heads: int, kv_heads: int, mask: Any = None, **arguments: Any) -> tuple[Any, Any]:
    """Return (messages, bytes) received forward and backward, for 12 n float32 tokens a rank of head_dim 8."""
    traced = TracedComm(comm)
    tokens = 12 * comm.Get_size() * comm.Get_size()
    with ALGORITHMS[name](traced, mask=mask, layout="contiguous", **arguments) as attention:
        own = len(attention.positions(tokens))
        q, k = (np.ones((1, count, own, 8), np.float32) for count in (heads, kv_heads))
        out, saved = attention.forward(q, k, k)
        forward = traced.trace.received()
        traced.trace.clear()
        attention.backward(out, saved)
        return forward, traced.trace.received()


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("group", [1, 3])
def test_formulas(comm: Any, group: int) -> None:
    n = comm.Get_size()
    kv_heads = 2 * n
    heads = group * kv_heads
    row = heads * 12 * n * 4  # bytes of a row of delta, half of one of lse; a head of Q has 8 numbers for each
    q = 8 * row
    assert received(comm, "allgather", heads, kv_heads) == (
        (n - 1, (n - 1) * 2 * q // group),
        (2 * (n - 1), (n - 1) * 4 * q // group),
    )
    passes = received(comm, "ulysses", heads, kv_heads)
    for (messages, nbytes), rows in zip(passes, (2, 3), strict=True):
        assert messages == 2 * (n - 1)
        assert nbytes * n == (n - 1) * (2 * q + 2 * q // group + rows * row)
    for ulysses, rows_, cols in hybrid.shapes(n):
        passes = received(comm, "hybrid", heads, kv_heads, ulysses=ulysses, rows=rows_, cols=cols)
        exchange = [(ulysses - 1) * (2 * q + 2 * q // group + rows * row) // ulysses for rows in (2, 3)]
        if cols == 1:
            inner = [(rows_ - 1) * 2 * q // group, (rows_ - 1) * 4 * q // group]
        else:
            inner = [
                (cols - 1) * (2 * q + 2 * row) + (rows_ - 1) * 2 * q // group,
                (cols - 1) * (3 * q + 3 * row) + (rows_ - 1) * 4 * q // group,
            ]
        assert [nbytes for _, nbytes in passes] == [a + b for a, b in zip(exchange, inner, strict=True)]


@pytest.mark.mpi(sizes=[2, 4, 6])
def test_fewer_kv_heads_than_ranks(comm: Any) -> None:
    """Each rank is sent the one K/V head that it needs, not all."""
    n = comm.Get_size()
    (_, nbytes), _ = received(comm, "ulysses", 2 * n, 1)
    head = 12 * n * 8 * 4
    assert nbytes == (n - 1) * (2 * head + 2 * head + 2 * (head + 12 * n * 8))


@pytest.mark.mpi(sizes=[6])
def test_window_saves_messages_of_the_ring(comm: Any) -> None:
    """A short window brings the chunk before, whatever the number of chunks."""
    arguments = {"ulysses": 2, "rows": 3, "cols": 1}
    (_, all_bytes), _ = received(comm, "hybrid", 4, 4, **arguments)
    (_, window_bytes), _ = received(comm, "hybrid", 4, 4, mpiattn.SlidingWindow(5), **arguments)
    chunk = 2 * 2 * (12 * 6 * 2) * 8 * 4  # K and V, 2 heads, both ranks' tokens
    assert all_bytes - window_bytes == (2 if comm.Get_rank() < 2 else 1) * chunk


@pytest.mark.mpi(max_size=6)
def test_saved_does_not_grow_with_ranks(comm: Any) -> None:
    n = comm.Get_size()
    for name in NAMES:
        with ALGORITHMS[name](comm) as attention:
            shapes = {"q": (1, n, 6 * n, 8), "k": (1, n, 6 * n, 8)}
            index = attention.owned("q", shapes)(shapes["q"], comm.Get_rank())
            own = np.zeros(shapes["q"])[index]
            _, saved = attention.forward(own, own, own)
            arrays = (saved.q, saved.k, saved.v, saved.out)
            assert [array.nbytes for array in arrays] == 4 * [n * 6 * 8 * 8], name
