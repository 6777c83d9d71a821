"""Warnings about where the ranks run, as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .groups import group, ranges

SOFTWARE = ("mpiattn", "numpy", "mpi4py", "python", "mpi", "mpi_standard", "thread_level", "platform", "gpu_kernel")
"""Facts that should be the same on all ranks."""

SIZES = {
    "PMI_SIZE": "MPICH, Intel MPI or another with Hydra",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "MV2_COMM_WORLD_SIZE": "MVAPICH",
    "SLURM_STEP_NUM_TASKS": "srun's",
}
"""Where launchers say how many processes they have started, and whose they are."""

LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
"""Where they number the processes of a host."""


def launcher_warnings(environ: Mapping[str, str], size: int) -> list[str]:
    """Warn when the launcher started more ranks than MPI knows of: each would do all the work alone."""
    told = {name: int(environ[name]) for name in SIZES if environ.get(name, "").isdecimal()}
    started = max(told.values(), default=1)
    if size == 1 < started:
        name = max(told, key=lambda name: told[name])
        return [
            f"{started} processes were started, and each is alone: mpiexec is of another MPI library ({SIZES[name]}) "
            "than mpi4py's, which `mpiattn env` shows; start with the mpiexec of that one"
        ]
    return []


def first_of_host(environ: Mapping[str, str]) -> bool:
    """Say whether this is the first of the processes that a launcher has started on this host."""
    return next((environ[name] for name in LOCAL_RANKS if name in environ), "0") == "0"


def mixture_warnings(ranks: Sequence[Mapping[str, object]]) -> list[str]:
    """Warn when the ranks don't run the same software."""
    warnings = []
    for name in SOFTWARE:
        groups = group(ranks, [name])
        if len(groups) > 1:
            found = "; ".join(f"{key} on {_ranks(numbers)}" for (key,), numbers in groups)
            warnings.append(f"the ranks differ in {name}: {found}")
    return warnings


def core_warnings(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn when the ranks of a host, or their BLAS threads, are more than the cores they may use."""
    warnings = []
    for (host,), numbers in group(ranks, ["host"]):
        here = [one for one in ranks if one["host"] == host]
        cores = len({core for one in here for core in one["cores"]})
        bound = f" (bound to them; it has {here[0]['host_cores']})" if cores < here[0]["host_cores"] else ""
        where = f"{_plural(cores, 'core')} of {host}{bound}"
        if len(here) > cores:
            warnings.append(f"{_plural(len(numbers), 'rank')} on {where}: oversubscribed, so timings mean little")
        threads = max(one["blas_threads"] or 1 for one in here)
        if threads > 1 and sum(one["blas_threads"] or 1 for one in here) > cores:
            warnings.append(
                f"{_plural(len(here), 'rank')} with {threads} BLAS threads each on {where}: "
                f"set OMP_NUM_THREADS={max(1, cores // len(here))}"
            )
    return warnings


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
