"""Damaged files are refused; the whole, 10,000 of them, is in benchmarks/faults."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mpiattn.commands.files import read
from mpiattn.trace.file import read as read_trace

PROGRAM = Path(__file__).parent / "damaged.py"
NAMES = ("q", "k", "v")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_damaged_files_are_read_or_refused() -> None:
    done = subprocess.run([sys.executable, PROGRAM, "--files", "500", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "500 damaged files, seed 1: 0 wrong" in done.stdout


def test_an_array_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    header = "\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 2147483648, 4), }"
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        for name in NAMES:
            archive.writestr(f"{name}.npy", header.ljust(127).encode("latin1") + b"\n")
    with pytest.raises(ValueError, match="q is damaged: 34359738368 bytes are announced, and fewer are there"):
        read(tmp_path / "in.npz", NAMES)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **{name: np.array([{}], object) for name in NAMES})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q is an array of Python objects"):
        read(tmp_path / "in.npz", NAMES)


@pytest.mark.parametrize("ranks", ["1000000000000", "-1", '"two"', "2.5"])
def test_a_trace_of_impossible_ranks_is_refused(tmp_path: Path, ranks: str) -> None:
    (tmp_path / "trace.json").write_text(f'{{"otherData": {{"ranks": {ranks}}}, "traceEvents": []}}')
    with pytest.raises(ValueError, match="is no number of ranks"):
        read_trace(tmp_path / "trace.json")
