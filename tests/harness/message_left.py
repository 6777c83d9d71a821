"""A message that nobody receives fails the test that sent it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi
def test_leaves(comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        comm.send("anyone?", dest=1, tag=5)


@pytest.mark.mpi
def test_next(comm: MPI.Intracomm) -> None:
    assert comm.allreduce(1) == comm.size
