"""Markers and fixtures of pytest-mpi: two tests are not for several ranks, the others use one folder on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi_skip
def test_skipped_on_several_ranks() -> None:
    pass


@pytest.mark.mpi_xfail
def test_wrong_on_several_ranks() -> None:
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size == 1


@pytest.mark.mpi
def test_folder(comm: MPI.Intracomm, mpi_tmp_path: Path) -> None:
    (mpi_tmp_path / str(comm.rank)).touch()
    comm.Barrier()
    assert len(list(mpi_tmp_path.iterdir())) == comm.size


@pytest.mark.mpi
def test_file(comm: MPI.Intracomm, mpi_file_name: str) -> None:
    assert not Path(mpi_file_name).exists()
    assert set(comm.allgather(mpi_file_name)) == {mpi_file_name}
