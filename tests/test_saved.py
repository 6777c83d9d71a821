"""What forward saves for backward: what is changed in between is found."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_connection import EVERY, parts, raises

import mpiattn
from mpiattn import ALGORITHMS
from mpiattn.algorithms.saved import fingerprint

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("changed", ["q", "k", "v", "out", "lse", "sinks"])
def test_what_backward_needs_is_changed(comm: MPI.Intracomm, name: str, changed: str) -> None:
    """On one rank is enough; the other ranks do not wait for it."""
    if name == "decode" and changed in "kv":
        pytest.skip("a cache is too long to be read once more for each token")
    with ALGORITHMS[name](comm) as attention:
        q, k, v, d_out = parts(comm, attention)
        _, saved = attention.forward(q, k, v, sinks=np.zeros(2))
        if comm.rank == comm.size - 1:
            array = getattr(saved, changed)
            array += 1
            raised = array.size > 0
        else:
            raised = False
        if any(comm.allgather(raised)):
            raises(comm, lambda: attention.backward(d_out, saved), "were changed", "between forward and backward")


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", EVERY)
def test_ranks_go_back_from_different_forwards(comm: MPI.Intracomm, name: str) -> None:
    with ALGORITHMS[name](comm) as attention:
        q, k, v, d_out = parts(comm, attention)
        first, second = (attention.forward(q, k, v)[1] for _ in range(2))
        attention.backward(d_out, second)
        attention.backward(d_out, first)
        if comm.size > 1:
            mixed = first if comm.rank == comm.size - 1 else second
            raises(comm, lambda: attention.backward(d_out, mixed), "saved by another forward than on rank 0")
        attention.backward(d_out, first)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("kind", [np.memmap, np.ndarray])
def test_what_backward_needs_is_changed_in_an_array_of_any_class(
    comm: MPI.Intracomm, kind: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Own(np.ndarray[Any, Any]):
        pass

    def of_that_kind(array: Any) -> Any:
        if kind is np.ndarray:
            return array.view(Own)
        result = np.memmap(tmp_path_factory.mktemp("mapped") / "array", array.dtype, "w+", shape=array.shape)
        result[...] = array
        return result

    with mpiattn.RingAttention(comm) as attention:
        q, k, v, d_out = map(of_that_kind, parts(comm, attention))
        _, saved = attention.forward(q, k, v)
        attention.backward(d_out, saved)
        q += comm.rank == comm.size - 1
        raises(comm, lambda: attention.backward(d_out, saved), "were changed on rank", "between forward and backward")


@pytest.mark.mpi(max_size=4)
def test_the_gradient_of_sinks_that_were_changed(comm: MPI.Intracomm) -> None:
    with mpiattn.RingAttention(comm) as attention:
        q, k, v, d_out = parts(comm, attention)
        sinks = np.zeros(2)
        _, saved = attention.forward(q, k, v, sinks=sinks)
        sinks -= 0.1 * attention.sink_gradient(d_out, saved)  # as an optimizer does
        raises(comm, lambda: attention.sink_gradient(d_out, saved), "were changed on rank 0")


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attention_is_not_copied(comm: MPI.Intracomm, copied: Any) -> None:
    """A copy would share its buffers."""
    with mpiattn.RingAttention(comm) as attention, pytest.raises(TypeError, match="build another one"):
        copied(attention)


def test_the_fingerprint_sees_order() -> None:
    """Values moved within one array, or exchanged between two."""
    q, k = np.random.default_rng(0).standard_normal((2, 1, 4, 300, 64))
    moved = [np.flip(q, axis) for axis in (1, 2, 3)] + [np.roll(q, 1, axis) for axis in (1, 2, 3)]
    prints = [fingerprint(*arrays) for arrays in ((q, k), (k, q), *((each, k) for each in moved))]
    assert len(set(prints)) == len(prints)
    assert fingerprint(q.copy(), k) == prints[0]
