"""Runs well on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi
def test_sum(comm: MPI.Intracomm) -> None:
    assert comm.allreduce(comm.rank) == comm.size * (comm.size - 1) // 2


@pytest.mark.mpi(sizes=[2, 99])
def test_never() -> None:
    raise AssertionError


def test_not_mpi() -> None:
    pass
