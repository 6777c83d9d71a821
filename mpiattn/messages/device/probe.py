"""Whether the MPI library takes device memory: it is tried, first where nothing is lost if it dies of that."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

FROM_LAUNCHER = ("PMI_", "PMIX_", "PRTE_", "OMPI_COMM_", "OMPI_UNIVERSE", "HYDI_", "HYDRA_", "SLURM_", "MPI_LOCAL")

PROBE = """
import cupy
from mpi4py import MPI
sent = cupy.arange(2**16).astype("u1")
got = cupy.zeros_like(sent)
cupy.cuda.Device().synchronize()
request = MPI.COMM_SELF.Irecv(got, 0)
MPI.COMM_SELF.Send(sent, 0)
request.Wait()
assert (sent == got).all()
"""


@cache
def survives_probe() -> bool:
    """Return whether a process of its own survives a message of device memory; a library that can't dies of it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FROM_LAUNCHER)}
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


found: list[bool] = []
"""Result of the probe of the MPI library, in a list that is empty before it."""


def takes_device_memory(comm: Any, xp: ModuleType) -> bool:
    """Find out by messages whether the MPI library takes device memory; all ranks call it together.

    The first one is in a process of its own, on rank 0. The second goes to the next rank.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    answer = comm.bcast(found[0] if rank == 0 and found else None)
    if answer is None:
        answer = comm.bcast(survives_probe() if rank == 0 else None)
        if answer:
            numbers, source = xp.arange(2**20).astype(np.uint8), (rank - 1) % size
            sent, got = numbers + np.uint8(rank % 251), xp.zeros_like(numbers)
            xp.cuda.Device().synchronize()
            request = comm.Irecv(got, source, 0)
            comm.Send(sent, (rank + 1) % size, 0)
            request.Wait()
            answer = all(comm.allgather(bool((got == numbers + np.uint8(source % 251)).all())))
    found[:] = [answer]
    return bool(answer)
