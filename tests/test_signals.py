"""Signals of a scheduler, and disks that are full, read-only or gone, while a command runs or writes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from launch import mpiexec

from mpiattn.commands import files
from mpiattn.errors import WriteError
from mpiattn.machines import writing

LONG = ("compare", "--algorithms", "ring", "--iterations", "100000", "--tokens", "64", "--timeout", "60")

CODE = """\
import os, sys, threading
from mpiattn.commands.cli import main, world
rank = world().rank  # MPI itself takes its time to start
if {ranks} in (None, rank):
    threading.Timer(2, os.kill, (os.getpid(), {number})).start()
print("so far " + str(rank))
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [None, 0])
def test_a_signal_ends_a_command_with_a_line_that_says_how_to_run_it_again(
    number: signal.Signals, ranks: int | None, tmp_path: Path
) -> None:
    code = CODE.format(ranks=ranks, number=int(number))
    done = mpiexec(2, sys.executable, "-c", code, *LONG, cwd=tmp_path, env={"SLURM_JOB_ID": ""})
    assert done.returncode != 0
    line = rf"mpiattn: ended by {number.name} after \d+ s; again: mpiexec -n 2 mpiattn {' '.join(LONG)}\n"
    assert len(re.findall(line, done.stderr)) == 1, done.stderr
    assert "so far 0" in done.stdout  # it stood in a buffer
    assert "mpiattn.watch" not in done.stderr and not list(tmp_path.iterdir())


def test_in_a_batch_job_it_is_queued_again(tmp_path: Path) -> None:
    code = CODE.format(ranks=None, number=int(signal.SIGTERM))
    done = mpiexec(2, sys.executable, "-c", code, *LONG, cwd=tmp_path, env={"SLURM_JOB_ID": "417"})
    assert "again: scontrol requeue 417\n" in done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB, with a file in it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "mpiattn", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        write(folder / "out.npz", 10)
        yield folder
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=False)
        subprocess.run(["umount", "-l", str(folder)], check=True)


def write(path: Path, tokens: int) -> None:
    files.write(path, {"q": np.zeros((1, 1, tokens, 4), np.float32)})


def test_a_full_disk_leaves_the_old_file_whole(small: Path) -> None:
    with pytest.raises(WriteError, match="No space left"):
        write(small / "out.npz", 10_000)
    assert [path.name for path in small.iterdir()] == ["out.npz"]
    with np.load(small / "out.npz") as whole:
        assert whole["q"].shape[2] == 10


def test_a_disk_that_has_become_read_only_leaves_the_old_file_whole(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(WriteError, match="Read-only"):
        write(small / "out.npz", 5)
    with np.load(small / "out.npz") as whole:
        assert whole["q"].shape[2] == 10


def test_a_folder_that_vanishes_while_a_file_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(WriteError, match="No such file"), writing.replacing(folder / "out.json") as part:
        part.write_text("half")
        shutil.rmtree(folder)
    assert not folder.exists() and not writing.UNDER_WAY
