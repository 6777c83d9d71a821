"""Numbers as arguments: NumPy's are taken where Python's are, and mean the same on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpiattn
from mpiattn import InputError
from mpiattn.planner.task import Task
from mpiattn.problems import grid
from mpiattn.problems.scalars import plain, real, text, whole

WHOLE: list[Callable[[int], Any]] = [int, np.int8, np.uint16, np.int64, np.uint64, lambda number: np.array(number)]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers(kind: Callable[[int], Any]) -> None:
    assert whole(kind(7)) == 7 and type(whole(kind(7))) is int
    assert text(kind(7)) == text(7) == text(7.0) == text(np.float32(7)) == "7"
    assert real(kind(7)) == 7.0 and type(real(kind(7))) is float


@pytest.mark.parametrize("value", [None, True, np.True_, "7", 7.5, 7.0, np.float64(7), [7], np.array([7]), 7j])
def test_what_is_no_whole_number(value: Any) -> None:
    assert whole(value) is None


def test_real_numbers() -> None:
    for value in (
        0.5,
        np.float16(0.5),
        np.float32(0.5),
        np.longdouble(0.5),
        ml_dtypes.bfloat16(0.5),
        np.array(0.5),
        Fraction(1, 2),
    ):
        assert real(value) == 0.5 and type(real(value)) is float
    assert type(plain(np.longdouble(0.5))) is float
    for value in (None, True, "0.5", np.nan, np.inf, np.float32("inf"), 10**400, 1j, np.array([0.5]), [0.5]):
        assert real(value) is None


@pytest.mark.parametrize("kind", WHOLE)
def test_grids_of_any_type(kind: Callable[[int], Any]) -> None:
    assert repr(grid.check(6, kind(2), kind(3))) == repr(grid.check(6, None, kind(3))) == "(2, 3)"


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array])
def test_dropout(kind: Callable[[float], Any]) -> None:
    taken = mpiattn.Dropout(kind(0.25), np.int64(7))
    assert taken == mpiattn.Dropout(0.25, 7) and repr(taken) == "Dropout(rate=0.25, seed=7)"
    assert mpiattn.Dropout(np.float32(0.1)).rate == float(np.float32(0.1)) == pytest.approx(0.1)
    assert mpiattn.Dropout(0.1, np.uint64(2**64 - 1)).seed == 2**64 - 1


@pytest.mark.parametrize("seed", [2**64, 10**30, -1, np.int64(-1), 0.5, 7.0, "7", None, True])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(InputError, match=r"a dropout seed is a whole number from 0 to 2\*\*64 - 1, got"):
        mpiattn.Dropout(0.1, seed)


@pytest.mark.parametrize("rate", [None, "0.1", 1, np.float32(1), np.nan, np.array([0.1]), 1j, 10**400, True])
def test_what_is_no_rate(rate: Any) -> None:
    with pytest.raises(InputError, match="a dropout rate is 0 or more and less than 1, got"):
        mpiattn.Dropout(rate)


def test_tasks() -> None:
    sizes = [np.int64(64), np.int32(4), np.uint8(2), np.array(8)]
    assert repr(Task(*sizes)) == repr(Task(64, 4, 2, 8))
    for wrong in (0, 2.5, "64", True, None):
        with pytest.raises(InputError, match="tokens must be a whole number, 1 or more"):
            Task(wrong, 4, 2, 8)  # type: ignore[arg-type]
    for large in (2**31, 2**63, 10**30):
        with pytest.raises(InputError, match="tokens is at most 2147483647 for a plan"):
            Task(large, 4, 2, 8)


def built(comm: Any, kind: Callable[[Any], Any]) -> list[tuple[Any, str]]:
    """Return attentions whose arguments are numbers of a kind, and what these are to be as text."""
    n = comm.Get_size()
    options = {"scale": kind(0.5), "softcap": kind(2.0)}
    mesh, gathered = (
        algorithm(comm, rows=kind(n), cols=kind(1), **options)
        for algorithm in (mpiattn.MeshAttention, mpiattn.GatheredMeshAttention)
    )
    hybrid = mpiattn.HybridAttention(comm, ulysses=kind(n), rows=kind(1), **options)
    double = mpiattn.DoubleRingAttention(comm, outer=kind(n))
    grouped = mpiattn.AllGatherAttention(comm, head_groups=kind(2))
    return [
        ((mesh, (mesh.rows, mesh.cols, mesh.scale, mesh.softcap)), f"({n}, 1, 0.5, 2.0)"),
        ((gathered, (gathered.rows, gathered.cols, gathered.scale, gathered.softcap)), f"({n}, 1, 0.5, 2.0)"),
        ((hybrid, (hybrid.ulysses, hybrid.rows, hybrid.cols, hybrid.inner.scale)), f"({n}, 1, 1, 0.5)"),
        ((double, (double.outer, double.inner)), f"({n}, 1)"),
        ((grouped, grouped.head_groups), "2"),
    ]


def numpys(number: Any) -> Any:
    """Return a number as NumPy's."""
    return np.float32(number) if isinstance(number, float) else np.int64(number)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [numpys, np.array])
def test_arguments_of_algorithms(comm: Any, kind: Callable[[Any], Any]) -> None:
    """They are taken, kept as Python's numbers, and the bits of the results are the same; so is their dtype."""
    tokens = 12
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, tokens, 8)).astype(np.float32)
    results = []
    for numbers in (kind, lambda number: number):
        outs = []
        for (attention, kept), expected in built(comm, numbers):
            assert repr(kept) == expected
            mine = attention.positions(np.int64(tokens))
            out, saved = attention.forward(
                q[:, :, mine], k[:, :, mine], v[:, :, mine], dropout=mpiattn.Dropout(numbers(0.5))
            )
            outs += [out, *attention.backward(out, saved)]
            attention.free()
        results.append(outs)
    for one, other in zip(*results, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_numbers_of_other_types_agree(comm: Any) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    for (attention, kept), expected in built(comm, numpys if last else lambda number: number):
        assert repr(kept) == expected
        attention.free()
    scale: Any = np.array(2) if last else 2.0
    with mpiattn.RingAttention(comm, scale=scale, mask=mpiattn.SlidingWindow(sys.maxsize if last else 10**30)):
        pass
    with pytest.raises(InputError, match=r"scale is 0\.10000000149"):
        mpiattn.RingAttention(comm, scale=np.float32(0.1) if last else 0.1)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mesh", {"rows": True}, "rows and cols of a grid are whole numbers, 1 or more, got True and None"),
        ("mesh", {"cols": np.float64(1)}, "whole numbers, 1 or more, got None and np.float64"),
        ("mesh", {"rows": np.array([1])}, "whole numbers, 1 or more"),
        ("mesh", {"rows": 10**30}, "does not hold"),
        ("double_ring", {"outer": "1"}, "whole numbers, 1 or more, got '1'"),
        ("hybrid", {"ulysses": "1"}, "ulysses, rows and cols are whole numbers, 1 or more, got '1', None, None"),
        ("hybrid", {"ulysses": 0}, "ulysses, rows and cols are whole numbers, 1 or more, got 0"),
        ("hybrid", {"ulysses": 10**30}, "is not . ranks: choose from"),
        ("allgather", {"head_groups": 1.5}, "head_groups is 1 or more, got 1.5"),
        ("ring", {"scale": True}, "a scale is a finite number, got True"),
        ("ring", {"scale": 10**400}, "a scale is a finite number"),
        ("ring", {"scale": np.float32("nan")}, "a scale is a finite number, got"),
        ("ring", {"scale": np.ones(1)}, "a scale is a finite number, got"),
        ("ring", {"softcap": np.float32(0)}, "a softcap is a number above 0, got"),
        ("ring", {"softcap": "2"}, "a softcap is a number above 0, got '2'"),
    ],
)
def test_what_is_refused(comm: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mpiattn.ALGORITHMS[name](comm, **arguments)
