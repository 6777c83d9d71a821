"""Hosts: the ranks that share one, and the GPU that each of them uses."""

from __future__ import annotations

import importlib.util
import math
import socket
import warnings
from types import ModuleType

from ..errors import InputError
from .connection import check
from .message import Communicator, constant


def hosts(comm: Communicator) -> list[tuple[int, ...]]:
    """Return for each rank all ranks of its host."""
    host = comm.Split_type(constant("COMM_TYPE_SHARED"))
    table: list[tuple[int, ...]] = comm.allgather(tuple(host.allgather(comm.Get_rank())))
    host.Free()
    return table


def by_host(comm: Communicator) -> tuple[list[int], int]:
    """Return the ranks host by host, and how many are on each: where these differ, their greatest common divisor."""
    table = hosts(comm)
    return sorted(range(len(table)), key=lambda rank: (min(table[rank]), rank)), math.gcd(*map(len, table))


def use_gpu(comm: Communicator) -> ModuleType:
    """Make one of the host's GPUs this rank's current device, by the rank's number on the host; return CuPy.

    Ranks share GPUs where there are more ranks than GPUs, with a warning.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks call this.

    Raises
    ------
    InputError
        On every rank, where one has no CuPy or finds no GPU.
    """
    check(comm)
    if importlib.util.find_spec("cupy") is None:
        missing = "CuPy is not installed: pip install 'mpiattn[cuda13]'"
    else:
        import cupy

        missing = "" if cupy.is_available() else "CuPy finds no GPU"
    for rank, reason in enumerate(comm.allgather(missing)):
        if reason:
            raise InputError(f"rank {rank} has no GPU: {reason}")
    host = comm.Split_type(constant("COMM_TYPE_SHARED"))
    # A launcher may have left each rank one GPU to see, another one for each rank: then all are number 0.
    device = cupy.cuda.Device(host.Get_rank() % cupy.cuda.runtime.getDeviceCount())
    device.use()
    used = host.allgather(device.pci_bus_id)
    if host.Get_rank() == 0 and len(used) > len(set(used)):
        warnings.warn(f"{len(used)} ranks share {len(set(used))} GPUs on {socket.gethostname()}", stacklevel=2)
    host.Free()
    return cupy  # type: ignore[no-any-return]
