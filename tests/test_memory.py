"""The formulas of memory against what virtual ranks count, and against what NumPy takes."""

from __future__ import annotations

import dataclasses
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import arrays, machines, virtual
from mpiattn.algorithms import ALGORITHMS, HybridAttention
from mpiattn.conformance.case import Case, fast
from mpiattn.costs.peak import Peak, peak
from mpiattn.problems.mask import Full
from mpiattn.problems.problem import Problem
from mpiattn.virtual import VirtualComm
from mpiattn.virtual.kernel import ClockedKernel

if TYPE_CHECKING:
    from mpi4py import MPI

# Small messages aren't copied on their way.
MACHINE = dataclasses.replace(machines.load("laptop"), eager=0)
CASES = [case for case in fast() if not case.sinks]


def shares(attention: Any, case: Case, rank: int) -> list[tuple[int, ...]]:
    """Return the shapes of a rank's q, k, v, out."""
    wholes = {name: np.broadcast_to(np.empty(1), shape) for name, shape in case.shapes.items()}
    return [whole[attention.owned(name, case.shapes)(whole.shape, rank)].shape for name, whole in wholes.items()]


def counted(comm: VirtualComm, name: str, case: Case, arguments: dict[str, Any]) -> tuple[Peak, Peak]:
    """Return what a virtual rank has held at most beside what it was given, and what the formula says."""
    me = comm.me
    with ALGORITHMS[name](comm, **case.options, **arguments) as attention:
        *qkv, d_out = (virtual.empty(shape, case.dtype) for shape in shares(attention, case, comm.Get_rank()))
        given = me.peak = me.held
        out, saved = attention.forward(*qkv, **case.given)
        forward, me.peak = me.peak - given, me.held
        attention.backward(d_out, saved)
        assert out.shape == d_out.shape
        seen = Peak(forward, me.peak - given)
        return seen, peak(name, attention.problem, comm.Get_rank(), **arguments)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "shared_ring"])
def test_virtual_ranks_hold_the_bytes_of_the_formula(name: str, ranks: int) -> None:
    for arguments in ALGORITHMS[name].variants(ranks):
        for case in CASES if ranks < 6 else CASES[ranks % 2 :: 2]:
            program = partial(counted, name=name, case=case, arguments=arguments)
            for rank, (seen, formula) in enumerate(virtual.run(ranks, MACHINE, program)):
                assert seen == formula, (rank, arguments, str(case))


@pytest.mark.parametrize(("n", "g"), [(4, 1), (6, 3), (12, 8)])
def test_the_table_in_units_of_q(n: int, g: int) -> None:
    dim, heads, tokens = 2**16, 2 * n * g, 2 * n  # rows of lse are next to nothing
    sizes = 1, heads, heads // g, dim, dim, n * tokens, n * tokens
    problem = Problem(n, *sizes, np.dtype(np.float32), "contiguous", Full())
    u, m, b = 2, n // 2, 2
    a, ring = n // b, (2 + 4 / g, 3 + 16 / g)
    table: list[tuple[str, int, dict[str, int], tuple[float, float]]] = [
        ("dense", 0, {}, (4 * n + 1 + 4 * n / g, 7 * n + 3 + (8 * n + 4) / g)),
        ("dense", 1, {}, (3 + 2 / g, 7 + 8 / g)),
        ("ring", 0, {}, ring),
        ("double_ring", 0, {"outer": 2}, (2 + 8 / g, 3 + 26 / g)),
        ("shared_ring", 0, {}, (2 + 4 / g, 3 + 6 / g)),
        ("mesh", 0, {"rows": b, "cols": a}, (2 * a + 3 + 2 * b / g, 5 * a + 6 + (4 * b + 6) / g)),
        ("mesh_gathered", 0, {"rows": b, "cols": a}, (5 * a + 2 + 4 * b / g, 10 * a + 3 + (10 * b + 4) / g)),
        ("allgather", 0, {}, (2 + 2 * (n + 1) / g, 3 + (6 * n + 4) / g)),
        ("allgather", 0, {"head_groups": 4}, (2 + (n + 1) / g, 3 + (4 + (5 * n + 1) / 2) / g)),
        ("ulysses", 0, {}, (7 - 1 / n + (6 - 2 / n) / g, 14 - 3 / n + (14 - 2 / n) / g)),
        (
            "hybrid",
            0,
            {"ulysses": u, "rows": m},
            (ring[0] + 5 - 1 / u + (6 - 2 / u) / g, ring[1] + (12 - 4 / u) * (1 + 1 / g)),
        ),
        ("hybrid", 0, {"ulysses": u, "rows": 1, "cols": m}, (2 * m + 8 + 7 / g, 5 * m + 16 + 20 / g)),
    ]
    for name, rank, arguments, formula in table:
        held = peak(name, problem, rank, False, **arguments)
        share = heads * tokens * dim * 4
        assert (held.forward / share, held.backward / share) == pytest.approx(formula, rel=1e-3), (name, arguments)


def keeps(comm: VirtualComm, name: str, case: Case, arguments: dict[str, Any]) -> bool:
    """Return whether the results of one call are the same after another."""
    rng = np.random.default_rng(comm.Get_rank() if name != "decode" else 0)
    kept = []
    with ALGORITHMS[name](comm, **case.options, **arguments) as attention:
        for _ in range(2):
            shapes = shares(attention, case, comm.Get_rank())
            *qkv, d_out = (rng.standard_normal(shape).astype(arrays.dtype(case.dtype)) for shape in shapes)
            out, saved = attention.forward(*qkv)
            results = [out, saved.lse, *attention.backward(d_out, saved)]
            kept.append((results, [array.copy() for array in results]))
    return all(np.array_equal(*pair) for results, copies in kept for pair in zip(results, copies, strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_results_have_memory_of_their_own(name: str, dtype: str) -> None:
    case = Case(tokens=20, dtype=dtype)
    one_host = dataclasses.replace(MACHINE, ranks_per_node=4)
    for arguments in ALGORITHMS[name].variants(4):
        assert all(virtual.run(4, one_host, partial(keeps, name=name, case=case, arguments=arguments)))


def measured(comm: Any, name: str, case: Case, arguments: dict[str, Any]) -> list[float]:
    """Return the ratio of what Python holds at most to the formula and the kernel's tiles, forward and backward."""
    rng = np.random.default_rng(0)
    with ALGORITHMS[name](comm, **case.options, **arguments) as attention:
        shapes = shares(attention, case, comm.Get_rank())
        *qkv, d_out = (rng.standard_normal(shape).astype(case.dtype) for shape in shapes)
        tracemalloc.start()
        out, saved = attention.forward(*qkv)
        seen = [tracemalloc.get_traced_memory()[1]]
        tiles = [scratch(attention)]
        tracemalloc.reset_peak()
        gradients = attention.backward(d_out, saved)
        seen.append(tracemalloc.get_traced_memory()[1])
        tiles.append(scratch(attention))
        tracemalloc.stop()
        assert out.shape == d_out.shape and len(gradients) == 3
        formula = peak(name, attention.problem, comm.Get_rank(), **arguments)
    return [most / (p + tile) for most, p, tile in zip(seen, (formula.forward, formula.backward), tiles, strict=True)]


def scratch(attention: Any) -> int:
    """Return the bytes of the NumPy kernel's tiles."""
    inside = attention.inner if isinstance(attention, HybridAttention) else attention
    kernel: Any = getattr(inside, "kernel", attention.kernel)  # a rank without heads has planned nothing inside
    real: Any = kernel.real if isinstance(kernel, ClockedKernel) else kernel
    return sum(tile.nbytes for tile in real.work.held.values())


LARGE = Case(layout="zigzag", tokens=400, heads=8, kv_heads=4, head_dim=64, v_head_dim=64, dtype="float32")
NARROW = dataclasses.replace(LARGE, dtype="float16", partials="narrow", mask="window=99")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("case", [LARGE, NARROW], ids=["wide", "narrow"])
def test_numpy_takes_the_memory_of_the_formula(name: str, case: Case) -> None:
    for arguments in ALGORITHMS[name].variants(1):
        [ratios] = virtual.run(1, MACHINE, partial(measured, name=name, case=case, arguments=arguments))
        assert ratios == pytest.approx([1, 1], abs=0.05), arguments


@pytest.mark.mpi(sizes=[4])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "shared_ring"])
def test_ranks_take_the_memory_of_the_formula(comm: MPI.Intracomm, name: str) -> None:
    case = dataclasses.replace(LARGE, tokens=400 * comm.size, mask="window=99")
    variants = ALGORITHMS[name].variants(comm.Get_size())
    for arguments in variants[len(variants) // 2 :][:1]:  # as square as can be
        measured(comm, name, dataclasses.replace(case, tokens=comm.size), arguments)  # imports what it needs
        assert measured(comm, name, case, arguments) == pytest.approx([1, 1], abs=0.05), arguments
