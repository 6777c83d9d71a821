"""All that there is to know of the ranks: software, host, cores, BLAS, GPUs."""

from __future__ import annotations

import os
import platform
import socket
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from ... import __version__, kernels
from ...arrays import gpus
from ...messages.message import Communicator
from .warnings import SOFTWARE, core_warnings, launcher_warnings, mixture_warnings


def environment(comm: Communicator, on_gpus: bool = False) -> dict[str, Any]:
    """Describe all ranks of a communicator; collective.

    Parameters
    ----------
    comm : communicator
    on_gpus : bool
        Whether the kernels on GPUs are loaded and tried, each rank's on its own: for what computes there.

    Returns
    -------
    dict
        The software of rank 0 by name (see `warnings.SOFTWARE`), `ranks`: a list with one dict a rank, and `warnings`:
        a list of sentences. The same on every rank, and ready for JSON.
    """
    everyone: list[dict[str, Any]] = comm.allgather({**_software(on_gpus), **_rank(comm.Get_rank())})
    return {
        **{name: everyone[0][name] for name in SOFTWARE},
        "ranks": [{name: value for name, value in one.items() if name not in SOFTWARE} for one in everyone],
        "warnings": [
            *launcher_warnings(os.environ, comm.Get_size()),
            *mixture_warnings(everyone),
            *core_warnings(everyone),
        ],
    }


def _software(on_gpus: bool) -> dict[str, str]:
    return {
        "mpiattn": __version__,
        "numpy": np.__version__,
        "mpi4py": version("mpi4py") if find_spec("mpi4py") else "none",
        "python": platform.python_version(),
        **_library(),
        "platform": platform.platform(),
        "gpu_kernel": kernels.on_gpus(on_gpus),
    }


def _library() -> dict[str, str]:
    """Describe the MPI library; there is none where the ranks are virtual and nothing has loaded one."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None:
        return dict.fromkeys(("mpi", "mpi_standard", "thread_level"), "none, virtual ranks")
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    first_line = MPI.Get_library_version().strip("\0\n").splitlines()[0]
    return {
        "mpi": " ".join(first_line.split(", package")[0].split()),  # Open MPI goes on with who built it
        "mpi_standard": ".".join(map(str, MPI.Get_version())),
        "thread_level": levels[MPI.Query_thread()],
    }


def _rank(rank: int) -> dict[str, object]:
    """Describe this process; it must have imported NumPy, whose BLAS library is asked for its threads."""
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    # threadpoolctl doesn't know every BLAS (Apple's, for one): then its name is known from the build alone.
    built_with: Any = np.show_config(mode="dicts")
    name = built_with["Build Dependencies"]["blas"]["name"]
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cpu": cpu_model(),
        "cores": _allowed_cores(),
        "host_cores": os.cpu_count() or 1,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "blas": ", ".join(f"{one['internal_api']} {one['version']}" for one in blas) or name,
        "blas_threads": max((one["num_threads"] for one in blas), default=None),
        "devices": gpus(),
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS can't bind a process to cores
