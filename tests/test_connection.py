"""Communicators: what an attention works on, keeps, and gives back; passes that fail; what the caller changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mpiattn
from mpiattn import ALGORITHMS, InputError
from mpiattn.conformance import oracle
from mpiattn.messages.connection import private
from mpiattn.problems.mask import Causal
from mpiattn.trace.comm import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI

TOKENS = 12
EVERY = [name for name in ALGORITHMS if name != "tensor_parallel"]


def parts(comm: Any, attention: Any, factor: float = 1.0) -> list[Any]:
    """Return this rank's q, k, v, d_out."""
    rng = np.random.default_rng(0)
    wholes = {name: factor * rng.standard_normal((1, 2, TOKENS, 4)) for name in ("q", "k", "v", "out")}
    shapes = {name: whole.shape for name, whole in wholes.items()}
    return [whole[attention.owned(name, shapes)(whole.shape, comm.Get_rank())] for name, whole in wholes.items()]


def raises(comm: Any, call: Callable[[], object], *words: str) -> None:
    """Assert that every rank raises the same InputError with these words in it."""
    with pytest.raises(InputError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert set(comm.allgather(str(caught.value))) == {str(caught.value)}


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", EVERY)
def test_messages_of_the_caller_never_meet_ours(comm: MPI.Intracomm, name: str) -> None:
    from mpi4py import MPI

    rank, size = comm.rank, comm.size
    got, anything = np.zeros(1), np.zeros(1)
    pending = [comm.Irecv(anything, MPI.ANY_SOURCE, MPI.ANY_TAG)]
    with ALGORITHMS[name](comm, mask=Causal()) as attention:
        q, k, v, d_out = parts(comm, attention)
        out, saved = attention.forward(q, k, v)
        attention.backward(d_out, saved)
        whole = mpiattn.gather(out, comm, attention.owned("out", {"q": (1, 2, TOKENS, 4), "k": (1, 2, TOKENS, 4)}),
                               shape=(1, 2, TOKENS, 4), copies=True)  # fmt: skip
    if whole is not None:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 2, TOKENS, 4)) for _ in "qkv")
        np.testing.assert_allclose(whole, oracle.attention(q, k, v, Causal())[0], atol=1e-12)
    pending.append(comm.Isend(np.full(1, rank + 1.0), (rank + 1) % size, tag=7))
    MPI.Request.Waitall(pending)
    assert anything[0] == (rank - 1) % size + 1 and got[0] == 0


@pytest.mark.mpi(sizes=[3])
@pytest.mark.parametrize("name", ["ring", "mesh", "mesh_gathered", "double_ring", "hybrid", "ulysses"])
def test_thousands_are_built_without_an_end(comm: MPI.Intracomm, name: str) -> None:
    for number in range(1200):  # a library has about 2,000 communicators
        attention = ALGORITHMS[name](comm)
        if number == 0:
            first = attention
    assert attention.comm is first.comm and attention.comm is private(comm)


@pytest.mark.mpi(sizes=[2])
def test_what_is_kept_goes_with_the_communicator(comm: MPI.Intracomm) -> None:
    for _ in range(1500):
        own = comm.Dup()
        mpiattn.RingAttention(own)
        own.Free()


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("name", EVERY)
def test_the_end(comm: MPI.Intracomm, name: str) -> None:
    with ALGORITHMS[name](comm) as attention:
        q, k, v, d_out = parts(comm, attention)
        _, saved = attention.forward(q, k, v)
    attention.free()
    raises(comm, lambda: attention.forward(q, k, v), "has ended", "build another")
    raises(comm, lambda: attention.backward(d_out, saved), "has ended")


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("name", ["ring", "shared_ring"])
def test_the_end_of_the_communicator(comm: MPI.Intracomm, name: str) -> None:
    own = comm.Dup()
    attention = ALGORITHMS[name](own)
    q, k, v, d_out = parts(comm, attention)
    _, saved = attention.forward(q, k, v)
    own.Free()
    raises(comm, lambda: attention.backward(d_out, saved), "communicator of this attention has been freed")


@pytest.mark.mpi(min_size=2, max_size=4)
def test_what_is_kept_outlives_its_traced_users(comm: MPI.Intracomm) -> None:
    kept, rank = private(comm), comm.Get_rank()
    part = kept.Split(0, rank)
    TracedComm(kept).Split(0, rank).Free()
    other = kept.Split(0, -rank)  # a communicator that was freed would give its place to this one
    assert part is kept.Split(0, rank) and part.handle != other.handle
    assert part.allgather(rank) == list(range(comm.Get_size())) == other.allgather(rank)[::-1]


@pytest.mark.mpi(sizes=[4])
def test_other_orders_are_other_communicators(comm: MPI.Intracomm) -> None:
    """Also for the ranks whose place in both orders is the same."""
    kept, rank = private(comm), comm.Get_rank()
    parts = [kept.Split(0, order[rank]) for order in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3])]
    assert parts[0] is parts[2] and parts[0] is not parts[1]
    assert parts[1].allgather(rank) == [0, 2, 1, 3]


@pytest.mark.mpi(sizes=[2])
def test_windows_of_many_attentions_are_few(comm: MPI.Intracomm) -> None:
    own = comm.Dup()
    for tokens in [*range(2, 40), *range(2, 40)]:
        attention = mpiattn.SharedRingAttention(own, layout="contiguous")
        q = np.full((1, 1, len(attention.positions(tokens)), 4), float(comm.rank))
        out, _ = attention.forward(q, q, q)
        assert np.isfinite(out).all()
    assert len(private(own).kept.windows) == 1
    own.Free()


@pytest.mark.mpi(max_size=3)
def test_no_communicator(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    for name in ALGORITHMS:
        raises(comm, partial(ALGORITHMS[name], None), "comm is None", "COMM_WORLD")  # type: ignore[arg-type]
        null: Any = MPI.COMM_NULL
        raises(comm, partial(ALGORITHMS[name], null), "has been freed")
    freed = comm.Dup()
    freed.Free()
    raises(comm, lambda: mpiattn.RingAttention(freed), "has been freed")
    raises(comm, lambda: mpiattn.MeshAttention(3), "no MPI communicator but int")  # type: ignore[arg-type]
    if comm.size > 1:
        half: Any = comm.Split(comm.rank == 0)
        both = half.Create_intercomm(0, comm, int(comm.rank == 0), tag=1)
        raises(comm, lambda: mpiattn.RingAttention(both), "two groups", "Merge")
        both.Free()
        half.Free()


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", [*EVERY, "tensor_parallel"])
def test_floating_point_settings_of_the_caller(comm: MPI.Intracomm, name: str) -> None:
    with ALGORITHMS[name](comm, mask=Causal()) as attention:
        for dtype, q_factor, v_factor in (("float32", 1.0, 1e-30), ("float16", 100.0, 1e-4)):
            q, k, v, d_out = (array.astype(dtype) for array in parts(comm, attention))
            q, v = ((array.astype(float) * factor).astype(dtype) for array, factor in ((q, q_factor), (v, v_factor)))
            with np.errstate(all="raise"):
                _, saved = attention.forward(q, k, v)
                attention.backward(d_out, saved)
                assert np.geterr()["over"] == "raise"


@pytest.mark.mpi(min_size=2, max_size=4)
def test_an_argument_that_nobody_knows_on_one_rank(comm: MPI.Intracomm) -> None:
    with mpiattn.RingAttention(comm) as attention:
        q, k, v, _ = parts(comm, attention)
        more: Any = {"causal": True} if comm.rank == 1 else {}
        raises(comm, lambda: attention.forward(q, k, v, **more), "argument on rank 1", "does not take")
        attention.forward(q, k, v)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ["ring", "mesh", "ulysses", "dense", "shared_ring"])
def test_a_pass_that_fails(comm: MPI.Intracomm, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never used again, nor are its communicators; a new one works beside it."""
    with ALGORITHMS[name](comm) as attention:
        q, k, v, _ = parts(comm, attention)
        attention.agree_forward(q, k, v)
        old = private(comm)

        def fail(*arguments: object, **named: object) -> None:
            raise RuntimeError("of the kernel")

        monkeypatch.setattr(attention, "attend", fail)
        with pytest.raises(RuntimeError, match="of the kernel"):
            attention.forward(q, k, v)
        raises(comm, lambda: attention.forward(q, k, v), "ended in RuntimeError: of the kernel", "build another")
    assert private(comm) is not old
    with ALGORITHMS[name](comm) as attention:
        attention.forward(q, k, v)
