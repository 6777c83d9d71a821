"""A pytest plugin for tests that run on several MPI ranks, and can't hang.

Use it with ``pytest_plugins = ["mpiattn.pytest_plugin"]`` in a conftest.py, or ``-p mpiattn.pytest_plugin``::

    mpiexec -n 4 python -m pytest --with-mpi

A test with the marker ``mpi`` runs on every rank, on a communicator of its own from the fixture ``comm``;
``@pytest.mark.mpi(min_size=2, max_size=6)`` or ``(sizes=[1, 4, 9])`` limits the number of ranks. It fails on all ranks
when it fails on one. All other tests run in a world of one rank only. Rank 0 alone prints. Without mpiexec, tests with
the marker are skipped, and no MPI library is needed; ``--with-mpi`` runs them on one rank.

The plugin works on top of pytest-mpi: its options, its markers ``mpi_skip`` and ``mpi_xfail`` and its fixtures
``mpi_tmp_path`` and ``mpi_file_name`` mean the same with it and, where it isn't installed, without it. A run under
mpiexec has no need of ``--with-mpi``: it would test nothing without.

- `referee`: the ranks meet after each phase of a test; one that doesn't come ends the job with its traceback
- `all_ranks`: pytest's hooks for a run on all ranks
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .all_ranks import COMM, FAILED, SKIPPED, AllRanks

if TYPE_CHECKING:
    from mpi4py import MPI

# An origin: pip leaves a folder of bytecode, which is no module, where it has removed pytest-mpi.
HAS_PYTEST_MPI = getattr(importlib.util.find_spec("pytest_mpi"), "origin", None) is not None
pytest_plugins = ["pytest_mpi"] if HAS_PYTEST_MPI else []

MARKERS = (
    "mpi(min_size=1, max_size=None, sizes=None): runs on all ranks under mpiexec, on these numbers of ranks",
    "mpi_skip: is skipped under mpiexec",
    "mpi_xfail: is expected to fail under mpiexec",
)

# Set for each rank by MPICH and Slurm (PMI), Open MPI, and srun --mpi=pmix.
LAUNCHED = any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"))


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the deadline, and the options of pytest-mpi where it isn't there to add them."""
    group = parser.getgroup("mpi", "tests on several MPI ranks")
    group.addoption(
        "--mpi-deadline",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long a rank that has finished a test waits for the others before it ends the job",
    )
    if not HAS_PYTEST_MPI or pluginmanager.is_blocked("pytest_mpi"):
        group.addoption("--with-mpi", action="store_true", help="run tests marked mpi, on one rank without mpiexec")
        group.addoption("--only-mpi", action="store_true", help="run no other tests")


@pytest.hookimpl(trylast=True)  # after pytest's own reporter, which AllRanks replaces
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and, under mpiexec, the hooks for all ranks."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if LAUNCHED or config.option.with_mpi or config.option.only_mpi:
        config.pluginmanager.register(AllRanks(config), "mpiattn-all-ranks")
        # Without it pytest-mpi skips all tests of MPI, and the run is green.
        config.option.with_mpi = not config.option.only_mpi


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip and deselect tests by their markers and the number of ranks; refuse markers that mean nothing."""
    plugin = config.pluginmanager.get_plugin("mpiattn-all-ranks")
    size = plugin.referee.size if plugin else 1
    errors, deselected = [], []
    for item in items:
        mark = item.get_closest_marker("mpi")
        if mark is not None:
            try:
                reason = size_mismatch(mark, size) if plugin else "needs mpiexec, or --with-mpi for one rank"
            except ValueError as error:
                errors.append(f"{item.nodeid}: {error}")
                continue
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
                item.stash[SKIPPED] = True
        elif "comm" in getattr(item, "fixturenames", ()):
            errors.append(f"{item.nodeid}: uses comm without @pytest.mark.mpi")
        elif not {"mpi_skip", "mpi_xfail"} & set(item.keywords) and (size > 1 or config.option.only_mpi):
            deselected.append(item)
        for name, meaning in (("mpi_skip", pytest.mark.skip), ("mpi_xfail", pytest.mark.xfail)):
            if plugin and item.get_closest_marker(name):
                item.add_marker(meaning(reason=f"marked {name}"))
    if errors:
        # Said once: every rank finds the same errors.
        raise pytest.UsageError(*(errors if not plugin or plugin.referee.rank == 0 else []))
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def size_mismatch(mark: pytest.Mark, size: int) -> str | None:
    """Return why a test with this mark can't run on `size` ranks, None if it can."""
    unknown = set(mark.kwargs) - {"min_size", "max_size", "sizes"}
    if mark.args or unknown:
        given = ", ".join([*map(repr, mark.args), *sorted(unknown)])
        raise ValueError(f"mark mpi takes min_size, max_size and sizes by name, not {given}")
    least, most = mark.kwargs.get("min_size", 1), mark.kwargs.get("max_size")
    sizes = mark.kwargs.get("sizes")
    counts = [least] + ([] if most is None else [most]) + list(sizes or [])
    if any(not isinstance(count, int) or count < 1 for count in counts) or sizes == []:
        raise ValueError(f"mark mpi takes positive numbers of ranks, not {mark.kwargs}")
    if size < least:
        return f"needs {least} ranks or more, here are {size}"
    if most is not None and size > most:
        return f"needs {most} ranks or fewer, here are {size}"
    if sizes is not None and size not in sizes:
        return f"needs {' or '.join(map(str, sizes))} ranks, here are {size}"
    return None


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Generator[MPI.Intracomm, None, None]:
    """Communicator of all ranks, for this test alone."""
    from mpi4py import MPI

    comm = request.node.stash.get(COMM, None) or MPI.COMM_WORLD.Dup()
    yield comm
    # After a failure messages may be under way. MPI libraries give the number of a freed communicator
    # to the next one, which would receive them: so it is not freed.
    if not request.node.stash.get(FAILED, False):
        status = MPI.Status()
        if comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            text = f"a message from rank {status.source} with tag {status.tag} was never received"
            pytest.fail(text, pytrace=False)
        comm.Free()


@pytest.fixture
def mpi_tmp_path(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """Folder that is empty and the same on all ranks (`tmp_path` is another one on each)."""
    path: Path = comm.bcast(tmp_path)
    return path


@pytest.fixture
def mpi_file_name(mpi_tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Name of a file that doesn't exist yet, the same on all ranks."""
    return str(mpi_tmp_path / f"{request.node.name}.hdf5")
