"""The ranks find the same tests in different orders, as from iterating over a set of strings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

LAST = (os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")) == "2"


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["b", "a"] if LAST else ["a", "b"])
def test_order(comm: MPI.Intracomm, name: str) -> None:
    assert comm.bcast(name) == name
