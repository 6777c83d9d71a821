"""The pytest plugin for several ranks: it must tell a failure on one rank on all, and must never hang.

Each test starts pytest under mpiexec on a file of harness/, which are not tests of mpiattn but tests that
fail, crash and hang on purpose.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import inherited, mpiexec

HERE = Path(__file__).parent
DEADLINE = 2  # seconds that a rank waits for the others
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", f"--mpi-deadline={DEADLINE}")
WITHOUT_PYTEST_MPI = ("-p", "no:pytest_mpi")
BOTH = [(), WITHOUT_PYTEST_MPI] if importlib.util.find_spec("pytest_mpi") else [()]
"""Options for a run with pytest-mpi, where it is installed, and for one without."""


def run(name: str, *options: str, n: int = 3) -> subprocess.CompletedProcess[str]:
    """Run harness/NAME.py on `n` ranks. A job that hangs raises TimeoutError here."""
    done = mpiexec(n, *PYTEST, *options, HERE / "harness" / f"{name}.py", cwd=HERE.parent, timeout=60)
    print(done.stdout, done.stderr)  # shown when an assertion fails
    return done


def alone(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command without mpiexec."""
    env = inherited() | environ
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=env)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.parametrize("options", [*BOTH, ("--with-mpi",), ("--only-mpi",)], ids=" ".join)
def test_runs_the_tests_of_mpi(options: tuple[str, ...]) -> None:
    """Also without --with-mpi, where pytest-mpi alone skips them all."""
    done = run("passes", *options)
    assert done.returncode == 0
    assert "1 passed, 1 skipped, 1 deselected" in done.stdout


@pytest.mark.parametrize("options", BOTH, ids=" ".join)
@pytest.mark.any_mpi
def test_without_mpiexec(options: tuple[str, ...]) -> None:
    done = alone(*PYTEST, *options, str(HERE / "harness/passes.py"))
    assert done.returncode == 0 and "1 passed, 2 skipped" in done.stdout
    done = alone(*PYTEST, *options, "--with-mpi", str(HERE / "harness/passes.py"))
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize("options", BOTH, ids=" ".join)
def test_markers_and_fixtures_of_pytest_mpi(options: tuple[str, ...]) -> None:
    done = run("marks", "--with-mpi", *options)
    assert done.returncode == 0
    assert "2 passed, 1 skipped, 1 xfailed" in done.stdout
    done = alone(*PYTEST, *options, str(HERE / "harness/marks.py"))
    assert done.returncode == 0 and "2 passed, 2 skipped" in done.stdout


@pytest.mark.any_mpi
def test_after_pytest_mpi_was_removed(tmp_path: Path) -> None:
    """Only a folder of bytecode is left."""
    (tmp_path / "pytest_mpi" / "__pycache__").mkdir(parents=True)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = alone(*PYTEST, "--with-mpi", str(HERE / "harness/passes.py"), PYTHONPATH=path)
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout


def test_in_another_project(tmp_path: Path) -> None:
    """The plugin needs nothing of mpiattn's own tests."""
    shutil.copy(HERE / "harness/one_rank_fails.py", tmp_path / "test_one.py")
    done = mpiexec(3, *PYTEST, "--with-mpi", "-p", "mpiattn.pytest_plugin", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "failed on rank 1: AssertionError: rank one gives up" in done.stdout
    assert "1 failed, 4 passed" in done.stdout


def test_mpiexec_of_another_library() -> None:
    """Each process would run all tests as a world of its own."""
    for name in ("OMPI_COMM_WORLD", "PMI"):
        done = alone(*PYTEST, str(HERE / "harness/passes.py"), **{f"{name}_RANK": "0", f"{name}_SIZE": "4"})
        if "4 processes were started, and each is alone" in done.stderr:
            assert done.returncode == 4
            return
    raise AssertionError("not noticed")


def test_passes_and_prints_once() -> None:
    done = run("passes")
    assert done.returncode == 0
    assert "1 passed, 1 skipped, 1 deselected" in done.stdout
    assert done.stdout.count("test session starts") == 1


@pytest.mark.any_mpi
def test_reason_of_a_skip() -> None:
    assert "needs 2 or 99 ranks, here are 3" in run("passes", "-rs").stdout


def test_one_rank_fails() -> None:
    done = run("one_rank_fails")
    assert done.returncode == 1
    assert "failed on rank 1: AssertionError: rank one gives up" in done.stdout
    assert ">       assert comm.rank != 1" in done.stdout  # the failing line, though rank 0 didn't fail
    assert "1 failed, 4 passed" in done.stdout  # the next tests don't meet the first one's message


def test_one_rank_raises_and_the_others_wait() -> None:
    done = run("one_rank_raises")
    assert done.returncode != 0
    assert "ranks 0, 1 did not finish within 2 s after rank 2" in done.stderr
    assert "ValueError: no such grid" in done.stderr
    assert done.stderr.count("line 17 in test_raises") == 2  # the Barrier, on two ranks


def test_one_rank_stuck() -> None:
    done = run("stuck_in_recv")
    assert done.returncode != 0
    assert "(call): rank 2 did not finish within 2 s" in done.stderr
    assert "in wait_for_nothing" in done.stderr
    assert "_pytest" not in done.stderr  # only frames of the test


def test_all_ranks_stuck() -> None:
    done = run("all_stuck")
    assert done.returncode != 0
    for rank in range(3):
        assert f"rank {rank} still runs after 2 s" in done.stderr
    assert done.stderr.count("in test_ring_of_receives") == 3


def test_one_rank_killed() -> None:
    assert run("one_rank_killed").returncode != 0


def test_one_fixture_fails() -> None:
    done = run("one_fixture_fails")
    assert done.returncode == 1
    assert "OSError: no such file" in done.stdout
    assert "skipped on rank 1 only: not here" in done.stdout
    assert "1 failed, 1 skipped, 1 xfailed, 1 error" in done.stdout


def test_message_left() -> None:
    done = run("message_left")
    assert done.returncode == 1
    assert "a message from rank 0 with tag 5 was never received" in done.stdout
    assert "2 passed, 1 error" in done.stdout


def test_ranks_disagree_on_the_tests() -> None:
    done = run("order_differs")
    assert done.returncode == 3
    assert "rank 2 found other tests than rank 0" in done.stdout


@pytest.mark.any_mpi
def test_misspelt_marks_are_rejected() -> None:
    done = run("misspelt")
    assert done.returncode == 4
    assert done.stderr.count("test_name: mark mpi takes min_size, max_size and sizes by name, not minsize") == 1
    assert "test_position: mark mpi takes" in done.stderr
    assert "test_empty: mark mpi takes positive numbers of ranks" in done.stderr
    assert "test_unmarked: uses comm without @pytest.mark.mpi" in done.stderr


@pytest.mark.any_mpi
def test_no_mpi_is_imported_without_mpi_tests() -> None:
    code = (
        "import sys, pytest; sys.modules['mpi4py.MPI'] = None\n"  # importing it raises ImportError
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(HERE / 'harness/passes.py')!r}]))"
    )
    done = alone(sys.executable, "-c", code)
    assert done.returncode == 0
    assert "1 passed, 2 skipped" in done.stdout


def test_launcher_ends_a_job_that_hangs() -> None:
    wait = "from mpi4py import MPI; print('waiting', flush=True); MPI.COMM_SELF.recv()"
    with pytest.raises(TimeoutError, match="waiting"):
        mpiexec(2, sys.executable, "-c", wait, timeout=3)
