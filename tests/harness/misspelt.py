"""Marks that would be ignored in silence, were they not checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.mark.mpi(minsize=4)
def test_name() -> None:
    pass


@pytest.mark.mpi(4)
def test_position() -> None:
    pass


@pytest.mark.mpi(sizes=[])
def test_empty() -> None:
    pass


def test_unmarked(comm: MPI.Intracomm) -> None:
    pass
