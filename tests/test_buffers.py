"""Buffers of messages: not written to before they are sent, and left as they should be for the next pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mpiattn
from mpiattn import ALGORITHMS
from mpiattn.arrays import Array
from mpiattn.conformance.case import Case, problem
from mpiattn.conformance.check import check
from mpiattn.costs import COSTS
from mpiattn.messages import message
from mpiattn.trace.comm import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI


class Late(TracedComm):
    """A communicator whose sends leave when they are waited for: a buffer that is written to before tells."""

    def _derived(self, comm: Any) -> TracedComm:
        derived = super()._derived(comm)
        return Late(derived.comm, derived.trace, derived.ranks)

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Any:
        return LateRequest(partial(super().Isend, buf, dest, tag))

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> Any:
        request = super().Irecv(buf, source, tag)
        return LateRequest(lambda: request)


class LateRequest:
    """A request that begins when it is waited for."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self.begin = begin

    @staticmethod
    def Waitall(requests: Sequence[LateRequest]) -> None:
        message.Waitall([request.begin() for request in requests])

    @staticmethod
    def Testall(requests: Sequence[LateRequest]) -> bool:
        return False


@pytest.mark.mpi
@pytest.mark.parametrize("mask", ["full", "causal", "window=8"])
@pytest.mark.parametrize("name", ["double_ring", "ring", "mesh"])
def test_buffers_stay_until_sent(comm: MPI.Intracomm, name: str, mask: str) -> None:
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):

        def late(traced: Any, arguments: Any = arguments, **options: Any) -> Any:
            return ALGORITHMS[name](Late(comm, traced.trace), **arguments, **options)

        check(late, comm, Case(layout="contiguous", mask=mask), partial(COSTS[name], **arguments))


def shares(attention: Any, case: Case, rank: int) -> dict[str, Array]:
    """Return a rank's shares of q, k, v and of the gradient of out."""
    given = {name: problem(case)[0][name] for name in case.shapes}
    return {n: np.ascontiguousarray(a[attention.owned(n, case.shapes)(a.shape, rank)]) for n, a in given.items()}


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "decode"])
def test_problems_in_turn(comm: MPI.Intracomm, name: str) -> None:
    """Forwards and backwards of several problems may be mixed; each gives the same bits when it comes again."""
    with ALGORITHMS[name](comm, mask=mpiattn.Causal()) as attention:
        runs = []
        for case in (Case(tokens=20), Case(heads=6, kv_heads=1, tokens=33)):
            own = shares(attention, case, comm.Get_rank())
            out, saved = attention.forward(own["q"], own["k"], own["v"])
            gradients = attention.backward(own["out"], saved)
            runs.append((own, np.array(out), saved, [np.array(array) for array in gradients]))
        for own, out, saved, gradients in runs:
            assert all(map(np.array_equal, gradients, attention.backward(own["out"], saved)))
            again, _ = attention.forward(own["q"], own["k"], own["v"])
            assert np.array_equal(out, again)
