"""The shared ring: exact, one problem after another, and nothing is received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import Causal, Documents, Full, SlidingWindow, gather, scatter
from mpiattn.algorithms.shared_ring import SharedRingAttention, one_host
from mpiattn.conformance import oracle
from mpiattn.problems.mask import Mask
from mpiattn.trace.comm import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI

LAYOUTS = ("contiguous", "zigzag", "striped")


def arrays(tokens: int, dtype: Any = np.float64) -> list[Any]:
    """Return q, k, v, d_out of a whole sequence: 4 heads on 2, K and V of different widths."""
    rng = np.random.default_rng(tokens)
    shapes = [(2, heads, tokens, dim) for heads, dim in ((4, 8), (2, 8), (2, 6), (4, 6))]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def error(comm: Any, attention: SharedRingAttention, wholes: list[Any]) -> float:
    """Return the largest relative error of out, d_q, d_k, d_v, on every rank."""
    layout = attention.layout
    q, k, v, d_out = (scatter(whole if comm.rank == 0 else None, comm, layout) for whole in wholes)
    out, saved = attention.forward(q, k, v)
    results = [gather(array, comm, layout) for array in (out, *attention.backward(d_out, saved))]
    worst = 0.0
    if comm.rank == 0:
        q, k, v, d_out = (whole.astype(np.float64) for whole in wholes)
        right = [oracle.attention(q, k, v, attention.mask)[0], *oracle.gradients(q, k, v, d_out, attention.mask)]
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(results, right, strict=True))
    return float(comm.bcast(worst))


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(5), Documents((20, 17))], ids=str)
def test_shared_ring_is_exact_and_receives_nothing(comm: MPI.Intracomm, mask: Mask, layout: str) -> None:
    traced = TracedComm(comm)
    with SharedRingAttention(traced, layout=layout, mask=mask) as attention:
        assert error(comm, attention, arrays(37)) < 1e-10
    assert traced.trace.received() == (0, 0)
    fences = [event for event in traced.trace.events if event.name == "Fence"]
    assert len(fences) == 1 + 1 + comm.size


@pytest.mark.mpi
def test_shared_ring_takes_one_problem_after_another(comm: MPI.Intracomm) -> None:
    with SharedRingAttention(comm, mask=Causal()) as attention:
        for tokens, dtype in ((16, np.float64), (3, np.float64), (64, np.float32), (16, np.float64)):
            assert error(comm, attention, arrays(tokens, dtype)) < (1e-10 if dtype == np.float64 else 2e-5)


@pytest.mark.mpi
def test_shared_ring_blocks_are_traced(comm: MPI.Intracomm) -> None:
    traced = TracedComm(comm)
    with SharedRingAttention(traced) as attention:
        error(comm, attention, arrays(4 * comm.size))
    blocks = [event.block for event in traced.trace.events if event.kind == "compute"]
    ring = [(4 * comm.rank, 4 * ((comm.rank - step) % comm.size)) for step in range(comm.size)]
    assert blocks == ring + ring


def test_shared_ring_needs_one_host() -> None:
    one_host(4, 4)
    with pytest.raises(ValueError, match="all 4 ranks on one host, here are 2: use ring or double_ring"):
        one_host(4, 2)
