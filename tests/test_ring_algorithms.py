"""Double ring, gathered mesh and decode: exact, and every byte as the formula says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpiattn import ALGORITHMS, Causal, Documents, DoubleRingAttention, Full, SlidingWindow, oracle
from mpiattn.arrays import dtype as dtype_of
from mpiattn.costs import COSTS, Traffic
from mpiattn.mask import Mask
from mpiattn.trace import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI

Array = NDArray[Any]

TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass
class Case:
    """A problem as a test states it."""

    q_tokens: int = 21
    kv_tokens: int = 21
    mask: Mask = Full()
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    v_head_dim: int = 4
    dtype: str = "float64"
    scale: float | None = None

    def arrays(self) -> list[Array]:
        """Return q, k, v, d_out of the whole sequences."""
        rng = np.random.default_rng(5)
        shapes = [
            (self.batch, heads, tokens, dim)
            for heads, tokens, dim in (
                (self.heads, self.q_tokens, self.head_dim),
                (self.kv_heads, self.kv_tokens, self.head_dim),
                (self.kv_heads, self.kv_tokens, self.v_head_dim),
                (self.heads, self.q_tokens, self.v_head_dim),
            )
        ]
        return [rng.standard_normal(shape).astype(dtype_of(self.dtype)) for shape in shapes]


CASES = [
    Case(),
    Case(mask=Causal()),
    Case(mask=SlidingWindow(3)),
    Case(mask=SlidingWindow(4, 2)),
    Case(mask=Documents([4, 0, 9, 8]) & Causal()),
    Case(mask=Documents([11, 10])),
    Case(q_tokens=7, kv_tokens=19),
    Case(q_tokens=19, kv_tokens=6, mask=Causal()),
    Case(q_tokens=2, kv_tokens=3, mask=Causal()),
    Case(q_tokens=0, kv_tokens=3),
    Case(heads=6, kv_heads=2, v_head_dim=3, mask=Causal(), scale=0.3),
    Case(heads=4, kv_heads=1, head_dim=3, v_head_dim=5, dtype="float32", mask=SlidingWindow(8)),
    Case(dtype="float16", mask=Causal(), head_dim=3),
    Case(dtype="bfloat16", v_head_dim=5),
]


def check(name: str, result: Array, expected: Array, dtype: str) -> None:
    """Compare with the oracle, relative to its largest value."""
    if not expected.size:
        assert result.shape == expected.shape, name
        return
    finite = np.isfinite(expected)
    assert np.array_equal(np.isneginf(result), np.isneginf(expected)), name
    error = np.abs(result.astype(np.float64) - expected, where=finite, out=np.zeros(expected.shape)).max()
    assert error <= TOLERANCE[dtype] * max(np.abs(expected[finite]).max(initial=0), 1e-3), f"{name} is off by {error}"


def received(comm: TracedComm) -> Traffic:
    """Return what this rank has received, and forget it."""
    traffic = Traffic(*comm.trace.received())
    comm.trace.clear()
    return traffic


def run(comm: Any, name: str, case: Case, layout: str, **arguments: Any) -> None:
    """Run an algorithm twice, forward and backward; check results and traffic."""
    q, k, v, d_out = case.arrays()
    out, lse = oracle.attention(q, k, v, case.mask, case.scale)
    grads = oracle.gradients(q, k, v, d_out, case.mask, case.scale)
    traced = TracedComm(comm)
    with ALGORITHMS[name](traced, layout=layout, mask=case.mask, scale=case.scale, **arguments) as attention:
        mine, keys = attention.positions(case.q_tokens), attention.positions(case.kv_tokens)
        shares = [
            np.ascontiguousarray(a[:, :, w]) for a, w in zip((q, k, v, d_out), (mine, keys, keys, mine), strict=True)
        ]
        first: list[Array] | None = None
        for _ in range(2):
            traced.trace.clear()
            result, saved = attention.forward(*shares[:3])
            forward = received(traced)
            gradients = attention.backward(shares[3], saved)
            backward = received(traced)
            check("out", result, out[:, :, mine], case.dtype)
            check("lse", saved.lse, lse[:, :, mine], case.dtype)
            for what, value, expected, where in zip(
                ("d_q", "d_k", "d_v"), gradients, grads, (mine, keys, keys), strict=True
            ):
                check(what, value, expected[:, :, where], case.dtype)
            assert attention.problem is not None
            costs = COSTS[name](attention.problem, comm.Get_rank(), **arguments)
            assert (forward, backward) == (costs.forward, costs.backward)
            bits = [np.array(a) for a in (result, saved.lse, *gradients)]
            assert first is None or all(a.tobytes() == b.tobytes() for a, b in zip(first, bits, strict=True))
            first = bits


@pytest.mark.mpi
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("name", ["double_ring", "mesh_gathered"])
def test_exact(comm: MPI.Intracomm, name: str, number: int) -> None:
    for turn, arguments in enumerate(ALGORITHMS[name].variants(comm.Get_size())):
        run(comm, name, CASES[number], LAYOUTS[(number + turn) % 3], **arguments)
