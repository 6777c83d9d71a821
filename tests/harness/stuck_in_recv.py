"""Rank 2 waits for a message that nobody sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


def wait_for_nothing(comm: MPI.Intracomm) -> None:
    comm.recv(source=0, tag=1)


@pytest.mark.mpi
def test_stuck(comm: MPI.Intracomm) -> None:
    if comm.rank == 2:
        wait_for_nothing(comm)
