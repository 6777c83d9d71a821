"""How commands end: Ctrl-C, full disks, folders that take no files; in one line, without a traceback or half a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from launch import environ, mpiexec, mpiexec_path

from mpiattn.errors import InputError, WriteError
from mpiattn.machines import writing
from mpiattn.messages.ending import until_read

COMMAND = [sys.executable, "-m", "mpiattn"]
SMALL = ["--tokens", "64", "--heads", "2", "--head-dim", "8"]
LIMIT = 8192
"""Bytes of the largest file that the processes may write: more than what is written to see whether it works."""


LIMITED = f"""
import resource, sys
from mpi4py import MPI  # has files of its own
from mpiattn.commands.cli import main
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
sys.exit(main())
"""


def alone(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command without mpiexec."""
    return subprocess.run(
        list(map(str, command)), env=environ(), capture_output=True, text=True, check=False, timeout=90
    )


WRITERS = {
    "out.npz": ["run", *SMALL[:2], "--output"],
    "out.safetensors": ["run", *SMALL[:2], "--output"],
    "compare.png": ["compare", *SMALL, "--virtual", "2", "--algorithms", "ring", "--plot"],
    "trace.json": ["compare", *SMALL, "--virtual", "4", "--algorithms", "ring", "--trace"],
    "schedule.json": ["schedule", "16x16", "--json"],
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.any_mpi
def test_a_disk_that_is_full_in_the_end(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    done = alone(sys.executable, "-c", LIMITED, *WRITERS[name], file)
    assert done.returncode == 1 and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    assert f"mpiattn: error: {file}: " in done.stderr and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.npz", "compare.png", "schedule.json"])
@pytest.mark.any_mpi
def test_a_folder_that_takes_no_file_is_found_before_the_work(name: str) -> None:
    """/proc takes none, even from root."""
    done = alone(*COMMAND, *WRITERS[name], f"/proc/{name}")
    assert done.returncode == 2 and done.stdout == "", (done.stdout, done.stderr)
    assert done.stderr.splitlines()[-1].startswith(f"mpiattn: error: /proc/{name}: can't be written: ")
    assert "Traceback" not in done.stderr


def test_every_rank_learns_that_the_disk_is_full() -> None:
    done = mpiexec(2, *COMMAND, "compare", *SMALL, "--algorithms", "ring", "--trace", "/dev/full")
    assert done.returncode == 1 and done.stderr.count("/dev/full: No space left on device") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.any_mpi
def test_standard_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "schedule", "4x4"],
            env=environ(), stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "mpiattn: error: standard output: No space left on device\n"


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    writing.write_json(file, {"a": 1})
    file.chmod(0o640)
    with pytest.raises(RuntimeError, match="stop"), writing.replacing(file) as part:
        part.write_text("half of")
        raise RuntimeError("stop")
    assert json.loads(file.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
    link = tmp_path / "link.json"
    link.symlink_to(file)
    writing.write_json(link, {"a": 2})
    assert link.is_symlink() and json.loads(file.read_text()) == {"a": 2}
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    writing.check(tmp_path / "new", tmp_path / "there", Path("/dev/null"), None)
    assert [file.name for file in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "kept"
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "such", "no such folder")):
        with pytest.raises(InputError, match=message):
            writing.check(path)
    with pytest.raises(WriteError, match="No space left"):
        writing.write_text("/dev/full", "x" * 10000)


def interrupted(*command: str, seconds: float = 1) -> subprocess.CompletedProcess[str]:
    """Start a command, and interrupt it so long after its work has begun, as Ctrl-C does."""
    with subprocess.Popen(
        command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("run "):
                break
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def own_lines(text: str) -> list[str]:
    """Return what is not from the MPI library's launcher, nor the frame of what it says of ranks that are gone."""
    return [line for line in text.splitlines() if line and not line.startswith(("[", "="))]


LONG = ["compare", "--iterations", "1000", "--algorithms", "ring,mesh"]


@pytest.mark.any_mpi
def test_interrupted_alone() -> None:
    done = interrupted(*COMMAND, *LONG, "--virtual", "2")
    assert done.returncode == 130, done.stderr
    assert own_lines(done.stderr)[-1] == "mpiattn: interrupted" and "Traceback" not in done.stderr


def test_interrupted_on_several_ranks() -> None:
    """MPICH hands the signal to its ranks; Open MPI ends them itself, without a word."""
    done = interrupted(mpiexec_path(), "-n", "3", *COMMAND, *LONG)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(own_lines(done.stderr)) < 12, done.stderr
    if "Press Ctrl-C again" in done.stderr:
        assert done.returncode == 130 and done.stderr.count("mpiattn: interrupted") == 1, done.stderr


def test_what_was_said_is_read_before_the_job_ends() -> None:
    """A launcher that reads late: MPICH's forgets what is left when a rank aborts."""
    reader, writer = os.pipe()
    os.write(writer, b"the reason\n")
    timer = threading.Timer(0.3, os.read, (reader, 100))
    timer.start()
    begun = time.monotonic()
    until_read(writer)
    assert 0.2 < time.monotonic() - begun < 4
    os.write(writer, b"nobody reads this\n")
    begun = time.monotonic()
    until_read(writer, patience=0.2)
    assert 0.2 <= time.monotonic() - begun < 2
    timer.join()
    os.close(reader)
    os.close(writer)
    until_read(writer)  # closed: nothing to wait for
