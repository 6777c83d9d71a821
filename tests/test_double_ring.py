"""The double ring on several hosts: its rows are hosts, and as few messages as can be cross between them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import DoubleRingAttention
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
from mpiattn.costs import COSTS
from mpiattn.messages.connection import private
from mpiattn.trace.comm import TracedComm
from mpiattn.trace.events import Trace

if TYPE_CHECKING:
    from mpi4py import MPI


class Hosts(TracedComm):
    """A communicator whose ranks pretend to be on the hosts of this list."""

    def __init__(self, comm: Any, hosts: list[int], trace: Trace | None = None) -> None:
        super().__init__(comm, trace)
        self.hosts = hosts

    def private(self) -> Hosts:
        """Pretend the same of the private duplicate."""
        return Hosts(private(self.comm), self.hosts, self.trace)

    def Split_type(self, split_type: Any, key: int = 0) -> TracedComm:
        return self.Split(self.hosts[self.Get_rank()], key)


@pytest.mark.mpi(sizes=[4, 6])
def test_rows_are_hosts(comm: MPI.Intracomm) -> None:
    """Ranks dealt to two hosts in turn: each row is a host."""
    size = comm.Get_size()
    made = []

    def on_two_hosts(traced: Any, **options: Any) -> DoubleRingAttention:
        made.append(DoubleRingAttention(Hosts(comm, [r % 2 for r in range(size)], traced.trace), **options))
        return made[-1]

    order = [*range(0, size, 2), *range(1, size, 2)]
    check(on_two_hosts, comm, Case(mask="full"), partial(COSTS["double_ring"], outer=2, order=order))
    [attention] = made
    assert (attention.outer, attention.inner, attention.order) == (2, size // 2, order)


@pytest.mark.mpi(sizes=[4, 6])
def test_the_message_from_the_other_host_is_posted_first(comm: MPI.Intracomm) -> None:
    """It is the only one each way that crosses between the hosts."""
    size, rank = comm.Get_size(), comm.Get_rank()
    traced = Hosts(comm, [r % 2 for r in range(size)])
    with DoubleRingAttention(traced) as attention:
        q = np.zeros((1, 1, 6, 4))
        traced.trace.clear()
        _, saved = attention.forward(q, q, q)
        peers = [event.peer for event in traced.trace.events if event.kind == "receive"]
        assert [(peer - rank) % 2 for peer in peers] == [1] + [0] * (size - 2)
        traced.trace.clear()
        attention.backward(q, saved)
        crossing = [e.name for e in traced.trace.events if e.kind == "receive" and (e.peer - rank) % 2]
        assert crossing == ["KV", "D_KV"]


@pytest.mark.mpi(sizes=[6])
def test_unequal_hosts(comm: MPI.Intracomm) -> None:
    """Hosts of 4 and 2 ranks make rows of 2, none of them on two hosts."""
    with DoubleRingAttention(Hosts(comm, [0, 1, 0, 0, 1, 0])) as attention:
        assert (attention.outer, attention.inner, attention.order) == (3, 2, [0, 2, 3, 5, 1, 4])


@pytest.mark.mpi(min_size=2)
def test_wrong_outer(comm: MPI.Intracomm) -> None:
    with pytest.raises(ValueError, match="choose from"):
        DoubleRingAttention(comm, outer=comm.Get_size() + 1)
