"""A message of more than 2**31 - 1 bytes, which no count of an MPI-3 library can hold."""

import os

import numpy as np
import pytest

from mpiattn.arrays import Parcel
from mpiattn.message import Tag, Waitall

NBYTES = 2**31 + 12_345


@pytest.mark.slow
@pytest.mark.mpi(sizes=[2])
def test_a_message_beyond_2_gib(comm) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if comm.allreduce(free < 3 * NBYTES):
        pytest.skip(f"needs {3 * NBYTES / 1e9:.0f} GB of free memory, here are {free / 1e9:.0f}")
    parcel = Parcel([((NBYTES,), np.uint8)])
    if comm.Get_rank() == 0:
        parcel.buffer[:] = np.resize(np.arange(251, dtype=np.uint8), NBYTES)
        Waitall([comm.Isend(parcel.message, 1, Tag.KV)])
    else:
        parcel.buffer.fill(255)
        Waitall([comm.Irecv(parcel.message, 0, Tag.KV)])
        wrong = [
            start
            for start in range(0, NBYTES, 251 * 2**20)
            for part in [parcel.buffer[start : start + 251 * 2**20]]
            if not np.array_equal(part, np.resize(np.arange(251, dtype=np.uint8), len(part)))
        ]
        assert not wrong
