"""Every rank waits for its neighbour to speak first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi
@pytest.mark.timeout(2)
def test_ring_of_receives(comm: MPI.Intracomm) -> None:
    word = comm.recv(source=(comm.rank - 1) % comm.size)
    comm.send(word, dest=(comm.rank + 1) % comm.size)
