"""The first test fails on rank 1 after a message was sent; the next ones meet no trace of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi(min_size=3)
def test_fails(comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        comm.send("stray", dest=2, tag=7)
    assert comm.rank != 1, "rank one gives up"


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("time", range(4))  # one of these would get the number of the first communicator
def test_next(comm: MPI.Intracomm, time: int) -> None:
    if comm.rank == 0:
        comm.send("mine", dest=2, tag=7)
    if comm.rank == 2:
        assert comm.recv(source=0, tag=7) == "mine"
    assert comm.allreduce(1) == 3
