"""Start a command on several MPI ranks from a test, with a time limit.

::

    done = mpiexec(3, sys.executable, "-m", "mpiattn", "compare", "--grid", "9x9")
    assert done.returncode == 2 and done.stderr.count("error") == 1
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# What an MPI launcher tells its ranks. A rank that starts a launcher of its own mustn't hand it on.
FROM_LAUNCHER = ("PMI_", "PMIX_", "PRTE_", "OMPI_", "MPI_LOCAL", "HYDI_", "HYDRA_", "SLURM_")

# Without cached bytecode every rank compiles all it imports: a second of CPU each, more with pytest.
SLOW = ("PYTHONDONTWRITEBYTECODE",)

# Asked of Open MPI; MPICH needs nothing of the kind and knows none of these names.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores; Open MPI 5
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # the same for Open MPI 4
    "OMPI_MCA_mpi_yield_when_idle": "1",  # then a rank mustn't hold its core while it waits
    "PRTE_MCA_hwloc_default_binding_policy": "none",  # jobs side by side would all bind to the first cores
}

NOT_STARTED = "The PMIx server's listener thread failed to start"
"""Open MPI's launcher says this when it can't start, and no rank has. It tells nothing of what it was to start."""

STARTS = 3


def inherited() -> dict[str, str]:
    """Return the environment, without what the launcher of this rank has put there, and without SLOW."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FROM_LAUNCHER + SLOW)}


def environ(**more: str) -> dict[str, str]:
    """Return the environment for an mpiexec, any library's, with more."""
    # Open MPI's launcher keeps files in a folder with its process id for a name, and can't start where an earlier one's
    # is left, which was killed and had the same id. So each has a place of its own.
    place = tempfile.mkdtemp(dir=sessions())
    return inherited() | {"OMP_NUM_THREADS": "1", "PRTE_MCA_prte_tmpdir_base": place} | OPEN_MPI | more


@functools.cache
def sessions() -> str:
    """Return a folder for the files of launchers, which is gone when this process ends."""
    folder = tempfile.mkdtemp(prefix="mpiattn-launch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def mpiexec_path() -> str:
    """Return the mpiexec beside this Python (MPI from pip), else the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    path = str(beside) if beside.exists() else shutil.which("mpiexec")
    if path is None:
        raise FileNotFoundError("no mpiexec beside this Python nor on PATH: pip install mpich")
    return path


def mpiexec(
    n: int,
    *command: str | Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command on `n` ranks; `env` is added to the environment.

    Raises TimeoutError with what was printed so far, after having ended every process of the job.
    """
    argv = [mpiexec_path(), "-n", str(n), *map(str, command)]
    for _ in range(STARTS):
        done = started(argv, timeout, env, cwd)
        if done.returncode == 0 or NOT_STARTED not in done.stderr:
            break
    return done


def started(
    argv: list[str], timeout: float, env: Mapping[str, str] | None, cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    """Start a launcher once."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environ(**(env or {})),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            out, err = end_job(process)
            if isinstance(error, subprocess.TimeoutExpired):
                message = f"{' '.join(argv)} still ran after {timeout:g} s\n{out}\n{err}"
                raise TimeoutError(message) from None
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def end_job(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End mpiexec and with it the ranks; return what they printed."""
    process.terminate()  # the ranks are in sessions of their own: their launcher knows how to end them
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()
