"""An exception on rank 2 while the others wait for it in a collective call: that can't go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi
def test_raises(comm: MPI.Intracomm) -> None:
    if comm.rank == 2:
        raise ValueError("no such grid")
    comm.Barrier()
