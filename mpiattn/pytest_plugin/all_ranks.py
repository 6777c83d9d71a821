"""pytest's hooks for a run on all ranks: what a test does on one of them counts on all."""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .referee import Outcome, Referee, ranks

if TYPE_CHECKING:
    from mpi4py import MPI

COMM: pytest.StashKey[MPI.Intracomm] = pytest.StashKey()
TIMER: pytest.StashKey[threading.Timer] = pytest.StashKey()
FAILED: pytest.StashKey[bool] = pytest.StashKey()
SKIPPED: pytest.StashKey[bool] = pytest.StashKey()
"""By the number of ranks: on all of them, which have nothing to tell each other."""


class AllRanks:
    """pytest hooks of a run under mpiexec."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        check_launcher(MPI.COMM_WORLD.size)
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
        """End a run in which the ranks have found different tests."""
        names = "\n".join(item.nodeid for item in session.items)
        digest = hashlib.sha256(f"{session.testsfailed} {names}".encode()).hexdigest()
        digests = [text for _, text in self.referee.meet("collection", Outcome.PASSED, digest)]
        different = [rank for rank, text in enumerate(digests) if text != digests[0]]
        if different:
            text = f"{ranks(different)} found other tests than rank 0, or in another order"
            pytest.exit(text, returncode=3)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Make the communicator of a test; set up its fixtures on all ranks."""
        # Made before any fixture, where all ranks are sure to come by.
        if "comm" in getattr(item, "fixturenames", ()) and SKIPPED not in item.stash:
            item.stash[COMM] = self.referee.world.Dup()
        yield from self.together(item, "setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Run the test itself on all ranks."""
        yield from self.together(item, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Take down its fixtures on all ranks."""
        yield from self.together(item, "teardown")

    def together(self, item: pytest.Item, phase: str) -> Generator[None, None, None]:
        """Run a phase of a test; raise on all ranks if it raised on one."""
        __tracebackhide__ = True
        if SKIPPED in item.stash:
            yield
            return
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

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        """Replace the timer of pytest-timeout, which would show the traceback of rank 0 alone."""
        timer = threading.Timer(settings.timeout, self.referee.timed_out, (item.nodeid, settings.timeout))
        timer.daemon = True
        item.stash[TIMER] = timer
        timer.start()
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> bool:
        """Stop the timer of a test that has ended."""
        if TIMER in item.stash:
            item.stash[TIMER].cancel()
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave MPI together with all other ranks."""
        # `python -m mpi4py` turns a non-zero exit status of any rank into an Abort, which could cut off
        # the report of rank 0. So all meet once more, and leave MPI together.
        self.referee.meet("the end of the tests", Outcome.PASSED)
        self.referee.close()
        # Finalize may wait for ever, for messages of a failed test.
        faulthandler.dump_traceback_later(self.referee.deadline, exit=True)
        self.mpi.Finalize()
        faulthandler.cancel_dump_traceback_later()


def check_launcher(size: int) -> None:
    """Refuse a run in which each rank would be alone and do all the work."""
    started = max(int(os.environ.get(name, "1")) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if size == 1 < started:
        raise pytest.UsageError(
            f"{started} processes were started, and each is alone: this mpiexec is of another MPI library than mpi4py's"
        )
