"""`mpiattn env`: where the ranks run, with which software, and whether they get in each other's way."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from threadpoolctl import threadpool_info

from . import kernels
from .arrays import gpus
from .message import Communicator

SOFTWARE = ("mpiattn", "numpy", "mpi4py", "python", "mpi", "mpi_standard", "thread_level", "platform", "gpu_kernel")
"""What should be the same on all ranks."""

COLUMNS = {
    "host": "host",
    "cpu": "CPU",
    "cores": "cores",
    "omp_num_threads": "OMP_NUM_THREADS",
    "blas": "BLAS",
    "blas_threads": "BLAS threads",
    "devices": "GPUs",
}
"""What the table shows of each rank, and how it is headed."""


def environment(comm: Communicator) -> dict[str, Any]:
    """Describe all ranks of a communicator; collective.

    Returns
    -------
    dict
        The software of rank 0 by name (see `SOFTWARE`), `ranks`: a list with one dict a rank, and `warnings`:
        a list of sentences. The same on every rank, and ready for JSON.
    """
    everyone: list[dict[str, Any]] = comm.allgather({**_software(), **_rank(comm.rank)})
    return {
        **{name: everyone[0][name] for name in SOFTWARE},
        "ranks": [{name: value for name, value in one.items() if name not in SOFTWARE} for one in everyone],
        "warnings": [*launcher_warnings(os.environ, comm.size), *mixture_warnings(everyone), *core_warnings(everyone)],
    }


def _software() -> dict[str, str]:
    return {
        "mpiattn": _own_version(),
        "numpy": np.__version__,
        "mpi4py": version("mpi4py") if find_spec("mpi4py") else "none",
        "python": platform.python_version(),
        **_library(),
        "platform": platform.platform(),
        "gpu_kernel": kernels.on_gpus(),
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


def _own_version() -> str:
    try:
        return version("mpiattn")
    except PackageNotFoundError:
        return "not installed, run from its source"


def _rank(rank: int) -> dict[str, Any]:
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


def launcher_warnings(environ: Mapping[str, str], size: int) -> list[str]:
    """Warn when the launcher started more ranks than MPI knows of: each would do all the work alone."""
    started = max(int(environ.get(name, "1")) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if size == 1 < started:
        return [f"{started} processes were started, and each is alone: mpiexec is of another MPI library than mpi4py's"]
    return []


def mixture_warnings(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn when the ranks don't run the same software."""
    warnings = []
    for name in SOFTWARE:
        groups = _group(ranks, [name])
        if len(groups) > 1:
            found = "; ".join(f"{key} on {_ranks(numbers)}" for (key,), numbers in groups)
            warnings.append(f"the ranks differ in {name}: {found}")
    return warnings


def core_warnings(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn when the ranks of a host, or their BLAS threads, are more than the cores they may use."""
    warnings = []
    for (host,), numbers in _group(ranks, ["host"]):
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


def text(info: Mapping[str, Any]) -> str:
    """Return an environment as lines to read: software, a table of the ranks, warnings."""
    software = [(name.replace("_", " "), info[name]) for name in SOFTWARE]
    shown = [{**one, "cores": _ranges(one["cores"]), "devices": ", ".join(one["devices"])} for one in info["ranks"]]
    columns = [name for name in COLUMNS if any(one[name] != "" for one in shown)]
    rows = [[_ranges(numbers), *key] for key, numbers in _group(shown, columns)]
    table = tabulate(rows, ["ranks", *(COLUMNS[name] for name in columns)], disable_numparse=True, missingval="-")
    warnings = "\n".join(f"warning: {sentence}" for sentence in info["warnings"])
    return "\n\n".join(filter(None, [tabulate(software, tablefmt="plain", disable_numparse=True), table, warnings]))


def _group(ranks: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """Return the ranks (their numbers) that have the same values under these names."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for one in ranks:
        groups.setdefault(tuple(one[name] for name in names), []).append(one["rank"])
    return list(groups.items())


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers in order as "0-3, 6"."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        runs.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return ", ".join(runs)


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn env`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the environment")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Print the environment, once; write it where asked."""
    info = environment(comm)
    if comm.rank == 0:
        print(text(info))
        if args.json:
            args.json.write_text(json.dumps(info, indent=2) + "\n")
    return 0
