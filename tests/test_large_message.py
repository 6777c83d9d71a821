"""A message of more than 2**31 - 1 bytes, which no count of an MPI-3 library can hold."""

import os
from typing import Any

import numpy as np
import pytest

from mpiattn.messages.message import Tag, Waitall
from mpiattn.messages.parcel import Parcel

NBYTES = 2**31 + 12_345


@pytest.mark.slow
@pytest.mark.mpi(sizes=[2])
def test_a_message_beyond_2_gib(comm: Any) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if comm.allreduce(free < 3 * NBYTES):
        pytest.skip(f"needs {3 * NBYTES / 1e9:.0f} GB of free memory, here are {free / 1e9:.0f}")
    parcel = Parcel([((NBYTES,), np.uint8)])
    places = np.unique(np.random.default_rng(0).integers(0, NBYTES, 10_000))
    places[-1] = NBYTES - 1
    if comm.Get_rank() == 0:
        parcel.fill(0)
        parcel.buffer[places] = 1
        Waitall([comm.Isend(parcel.message, 1, Tag.KV)])
    else:
        parcel.fill(255)
        Waitall([comm.Irecv(parcel.message, 0, Tag.KV)])
        assert np.array_equal(np.flatnonzero(parcel.buffer), places)
