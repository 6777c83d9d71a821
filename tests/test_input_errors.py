"""Bad input: every rank raises the same error before the first message, and the communicator stays usable."""

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpiattn
from mpiattn import InputError
from mpiattn.trace.comm import TracedComm


def zeros(rank: int, size: int, tokens: int = 6, heads: int = 4, dim: int = 8, dtype: Any = np.float32) -> Any:
    """This rank's share of a contiguous sequence of tokens * size."""
    return np.zeros((1, heads, tokens, dim), dtype)


def refused(comm: Any, build: Callable[[Any], Any], act: Callable[[Any], Any] = lambda attention: None) -> str:
    """Return the one message with which all ranks refuse, having sent nothing."""
    traced = TracedComm(comm)
    with pytest.raises(InputError) as caught:
        attention = build(traced)
        act(attention)
    texts = comm.allgather(str(caught.value))
    assert set(texts) == {texts[0]}
    assert not [event for event in traced.trace.events if event.kind in ("send", "receive")]
    return str(texts[0])


def ring(comm: Any) -> Any:
    return mpiattn.RingAttention(comm, layout="contiguous")


TEXT: Any = "x"
FRACTION: Any = 1.0

ARRAYS: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "heads no multiple of kv heads": (
        lambda r, n: (zeros(r, n, heads=4), zeros(r, n, heads=3), zeros(r, n, heads=3)),
        r"the 4 heads of q need k and v with one of \[1, 2, 4\] heads",
    ),
    "k and v differ": (lambda r, n: (zeros(r, n), zeros(r, n), zeros(r, n, tokens=5)), "same heads and tokens"),
    "head_dim differs": (lambda r, n: (zeros(r, n), zeros(r, n, dim=9), zeros(r, n)), "same head_dim"),
    "dtypes differ": (lambda r, n: (zeros(r, n), zeros(r, n, dtype=np.float64), zeros(r, n)), "one dtype"),
    "integers": (lambda r, n: (zeros(r, n, dtype=np.int64),) * 3, "q on rank 0 is int64 .* must be an array of 4 axes"),
    "three axes": (lambda r, n: (zeros(r, n)[0],) * 3, "must be an array of 4 axes"),
    "no array": (lambda r, n: ("q", "k", "v"), "no array that can be sent"),
    "a list": (lambda r, n: (zeros(r, n).tolist(),) * 3, "q on rank 0 is a list: np.asarray makes an array of it"),
    "big-endian": (lambda r, n: (zeros(r, n).astype(">f4"),) * 3, r"float32 in another byte order: array.astype"),
    "long double": (lambda r, n: (zeros(r, n).astype(np.longdouble),) * 3, r"of (longdouble|float128): array.astype"),
    "eight bits": (lambda r, n: (zeros(r, n).astype(ml_dtypes.float8_e4m3fn),) * 3, r"of float8_e4m3fn: array.astype"),
    "masked": (lambda r, n: (np.ma.masked_array(zeros(r, n)),) * 3, "a masked array"),
    "batch differs": (lambda r, n: (zeros(r, n), *[np.concatenate([zeros(r, n)] * 2)] * 2), "one batch size"),
}

ON_ONE_RANK: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "heads on one rank": (lambda r, n: (zeros(r, n, heads=4 + 4 * (r == n - 1)),) * 3, "only the number of tokens"),
    "dtype on one rank": (lambda r, n: (zeros(r, n, dtype="f8" if r == 1 else "f4"),) * 3, "on rank 1 is float64"),
    "tokens on one rank": (lambda r, n: (zeros(r, n, tokens=6 + 3 * (r == 1)),) * 3, "cut with positions"),
    "no array on one rank": (lambda r, n: (None if r == 1 else zeros(r, n),) * 3, "q on rank 1 is no array"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(comm: Any, case: str) -> None:
    make, message = ARRAYS[case]
    arrays = make(comm.Get_rank(), comm.Get_size())
    assert_matches(refused(comm, ring, lambda attention: attention.forward(*arrays)), message)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", ON_ONE_RANK)
def test_arrays_on_one_rank(comm: Any, case: str) -> None:
    make, message = ON_ONE_RANK[case]
    arrays = make(comm.Get_rank(), comm.Get_size())
    assert_matches(refused(comm, ring, lambda attention: attention.forward(*arrays)), message)


@pytest.mark.mpi
def test_gradient_of_another_shape(comm: Any) -> None:
    def act(attention: Any) -> None:
        q = zeros(comm.Get_rank(), comm.Get_size())
        _, saved = attention.forward(q, q, q)
        attention.comm.trace.clear()
        wrong = q[:, :, :5] if comm.Get_rank() == comm.Get_size() - 1 else q
        attention.backward(wrong, saved)

    assert "d_out on rank" in refused(comm, ring, act)


OTHERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "another algorithm": lambda comm, q, saved: mpiattn.UlyssesAttention(comm).forward(q, q, q)[1],
    "another scale": lambda comm, q, saved: mpiattn.RingAttention(comm, scale=0.3).forward(q, q, q)[1],
    "nothing": lambda comm, q, saved: None,
    "nothing on one rank": lambda comm, q, saved: None if comm.Get_rank() == 1 else saved,
    "fewer tokens on one rank": lambda comm, q, saved: (ring(comm).forward(*[q[:, :, :3]] * 3)[1], saved)[
        comm.Get_rank() != 1
    ],
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", OTHERS)
def test_saved_by_another(comm: Any, case: str) -> None:
    def act(attention: Any) -> None:
        q = zeros(comm.Get_rank(), comm.Get_size())
        _, saved = attention.forward(q, q, q)
        given = OTHERS[case](comm, q, saved)
        attention.comm.trace.clear()
        attention.backward(q, given)

    assert_matches(refused(comm, ring, act), "saved is not what forward|saved by another forward than on rank 0")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda comm: mpiattn.RingAttention(comm, layout="spiral"), "unknown layout 'spiral': choose from contiguous"),
        (
            lambda comm: mpiattn.MeshAttention(comm, rows=7, cols=11),
            "a grid of 7x11 does not hold . ranks: choose from 1x",
        ),
        (lambda comm: mpiattn.MeshAttention(comm, rows=77), "does not hold"),
        (lambda comm: mpiattn.MeshAttention(comm, rows=0), "whole numbers, 1 or more, got 0 and None"),
        (
            lambda comm: mpiattn.MeshAttention(comm, rows=FRACTION, cols=comm.Get_size()),
            "whole numbers, 1 or more, got 1.0",
        ),
        (lambda comm: mpiattn.RingAttention(comm, mask=TEXT), "a mask is Full.*, got 'x'"),
        (lambda comm: mpiattn.MeshAttention(comm, rows=None if comm.Get_rank() else TEXT), "got 'x' and None"),
        (lambda comm: mpiattn.RingAttention(comm, scale=TEXT), "a scale is a finite number, got .x."),
        (lambda comm: mpiattn.RingAttention(comm, scale=float("nan")), "a scale is a finite number, got nan"),
    ],
)
def test_arguments(comm: Any, build: Callable[[Any], Any], message: str) -> None:
    assert_matches(refused(comm, build), message)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("name", "option", "first", "other"),
    [
        ("ring", "mask", mpiattn.Full(), mpiattn.Causal()),
        ("ring", "layout", "striped", "zigzag"),
        ("ring", "scale", 1.0, 2.0),
        ("ring", "softcap", None, 30.0),
        ("ring", "partials", "wide", "narrow"),
        ("ring", "gpu_messages", "auto", "host"),
        ("ring", "deterministic", False, True),
        ("mesh", "rows", None, 1),
        ("mesh", "cols", None, 1),
        ("double_ring", "outer", None, 1),
        ("hybrid", "ulysses", None, 1),
    ],
)
def test_arguments_that_differ_between_ranks(comm: Any, name: str, option: str, first: object, other: object) -> None:
    given: dict[str, Any] = {"layout": "contiguous", option: other if comm.Get_rank() else first}
    message = refused(comm, lambda comm: mpiattn.ALGORITHMS[name](comm, **given))
    assert message == f"{option} is {other!r} on rank 1 and {first!r} on rank 0: it must be the same on every rank"


@pytest.mark.mpi(min_size=2)
def test_algorithms_that_differ_between_ranks(comm: Any) -> None:
    message = refused(comm, lambda comm: (mpiattn.RingAttention if comm.Get_rank() else mpiattn.MeshAttention)(comm))
    assert "RingAttention" in message and "MeshAttention" in message and "must be the same on every rank" in message


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "options"), [("ring", {}), ("mesh", {"cols": 1}), ("allgather", {"head_groups": 2}), ("decode", {})]
)
def test_one_collective_for_all_arguments(comm: Any, name: str, options: dict[str, Any]) -> None:
    with mpiattn.ALGORITHMS[name](TracedComm(comm), **options) as attention:
        assert [event.name for event in attention.comm.trace.events] == ["allgather"]


@pytest.mark.mpi(min_size=2)
def test_the_first_wrong_argument_decides(comm: Any) -> None:
    """Whichever rank has it, and before what is wrong with the algorithm's own arguments."""
    last = comm.Get_rank() == comm.Get_size() - 1
    wrong = {"softcap": -1.0} if last else {"partials": "wee"}
    message = refused(comm, lambda c: mpiattn.MeshAttention(c, rows=77, **wrong))
    assert message == "a softcap is a number above 0, got -1.0"
    message = refused(comm, lambda c: mpiattn.MeshAttention(c, rows=77, kernel="abacus" if last else None))
    assert message.startswith("unknown kernel 'abacus'")


@pytest.mark.mpi
def test_documents_of_another_length(comm: Any) -> None:
    q = zeros(comm.Get_rank(), comm.Get_size())
    mask = mpiattn.Documents([5])
    message = refused(
        comm, lambda c: mpiattn.RingAttention(c, layout="contiguous", mask=mask), lambda a: a.forward(q, q, q)
    )
    assert "the documents hold 5 tokens" in message


@pytest.mark.mpi
def test_nan_in_gives_nan_out(comm: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 20, 4))
    q[0, 1, 7, 2] = np.nan
    for algorithm in (mpiattn.RingAttention, mpiattn.MeshAttention, mpiattn.DenseAttention):
        with algorithm(comm, mask=mpiattn.Causal()) as attention:
            mine = attention.positions(20)
            out, _ = attention.forward(q[:, :, mine], k[:, :, mine], v[:, :, mine])
            assert np.isnan(out[0, 1, mine == 7]).all()
            assert np.isfinite(out[0, 0]).all() and np.isfinite(out[0, 1, mine != 7]).all()


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
