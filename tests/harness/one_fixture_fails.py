"""A fixture fails on rank 0 only, and another test is skipped on rank 1 only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.fixture
def file(comm: MPI.Intracomm) -> str:
    if comm.rank == 0:
        raise OSError("no such file")
    return "file"


@pytest.mark.mpi
def test_with_file(comm: MPI.Intracomm, file: str) -> None:
    comm.Barrier()  # not reached on any rank, else it would hang


@pytest.mark.mpi
def test_skipped_on_one(comm: MPI.Intracomm) -> None:
    if comm.rank == 1:
        pytest.skip("not here")


@pytest.mark.mpi
def test_skipped_on_all(comm: MPI.Intracomm) -> None:
    pytest.skip("nowhere")


@pytest.mark.mpi
@pytest.mark.xfail(reason="known")
def test_expected(comm: MPI.Intracomm) -> None:
    assert comm.rank != 1
