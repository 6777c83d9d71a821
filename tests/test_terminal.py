"""What commands show: tables and help that fit the terminal, progress in a log, warnings once on each host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import inherited, mpiexec

import mpiattn
from mpiattn.commands import cli, terminal
from mpiattn.commands.env.warnings import first_of_host, launcher_warnings
from mpiattn.commands.progress import bar

SMALL = ("--tokens", "64", "--heads", "2", "--head-dim", "8", "--iterations", "1")


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mpiattn", *arguments]
    return subprocess.run(words, env=inherited() | environ, capture_output=True, text=True, check=False, timeout=90)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_columns_leave_until_the_table_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [["a" * 20, "b" * 30, "c" * 10, "d" * 10]]
    text = terminal.table(
        rows, ["a", "b\nms", "c", "d"], drop=["b\nms", "c"], colalign=["left", "right", "left", "left"]
    )
    assert max(map(len, text.splitlines())) <= columns
    assert ("No room in 60 columns for: b ms." in text) == (columns == 60)
    assert "a" * 20 in text and "d" * 10 in text


def test_without_a_terminal_there_is_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(terminal, "terminal", lambda stream: None)
    assert terminal.width() == terminal.WIDE
    monkeypatch.setenv("COLUMNS", "wide")
    assert terminal.width() == terminal.WIDE


@pytest.mark.any_mpi
def test_help_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.parser().parse_args([name, "--help"])
        lines = capsys.readouterr().out.splitlines()
        # argparse does not fold the choices of one option, nor options that exclude each other.
        assert max(len(line) for line in lines if "{" not in line and " | " not in line) <= 72, name
    monkeypatch.setenv("COLUMNS", "80")  # in a usual terminal these fit as well
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.parser().parse_args([name, "--help"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, name


def test_prose_is_filled_and_what_is_indented_stays() -> None:
    text = "Some words and\nsome more.\n\n  name   what it is, in several words\n"
    assert terminal.fold(text, 80) == "Some words and some more.\n\n  name   what it is, in several words"
    assert terminal.fold("  mpiexec -n 4 mpiattn compare --tokens 2K", 30) == (
        "  mpiexec -n 4 mpiattn \\\n      compare --tokens 2K"
    )
    assert terminal.fold(text, 24) == ("Some words and some\nmore.\n\n  name   what it is, in\n         several words")


@pytest.mark.any_mpi
def test_the_table_of_compare() -> None:
    chosen = ("--virtual", "4", "--algorithms", "dense,ring,mesh", "--layout", "zigzag", "--iterations", "1")
    done = command("compare", *chosen, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "No room" not in done.stdout
    assert "4 virtual ranks of one host of the machine laptop: all times are simulated." in lines
    heads = next(line.split() for line in lines if "algorithm" in line)
    assert heads.count("error") == 1 and "formula" in heads and "peak" not in heads
    [ring] = [line.split() for line in lines if line.startswith("ring ")]
    assert ring[heads.index("formula")] == "9.9"


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "terminal", lambda stream: None)
    lines: Any = bar(None, total=3, unit="run")
    for text in ("ring", "mesh", "ring"):
        lines.set_postfix_str(text)
        lines.update()
    lines.close()
    assert capsys.readouterr().err == "run 1 of 3: ring\nrun 2 of 3: mesh\n"


def test_a_line_of_progress_for_each_algorithm() -> None:
    done = mpiexec(2, sys.executable, "-m", "mpiattn", "compare", "--algorithms", "ring,ulysses", *SMALL)
    assert done.returncode == 0
    begun = [line for line in done.stderr.splitlines() if line.startswith("run ")]
    assert [line.split(": ")[1].split()[0] for line in begun] == ["ring"] * 3 + ["ulysses"] * 3


LAUNCHERS = [
    {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
]


@pytest.mark.parametrize("environ", LAUNCHERS)
def test_who_was_started_by_another_library(environ: dict[str, str]) -> None:
    [warning] = launcher_warnings(environ, 1)
    assert warning.startswith("4 processes were started, and each is alone")
    assert launcher_warnings(environ, 4) == [] and not first_of_host(environ)
    assert launcher_warnings(dict.fromkeys(environ, "1"), 1) == []
    assert launcher_warnings({"SLURM_NTASKS": "4"}, 1) == []  # a batch script's own process
    assert first_of_host(dict.fromkeys(environ, "0")) and first_of_host({})


@pytest.mark.parametrize("arguments", [("compare", *SMALL, "--algorithms", "ring"), ("schedule", "2x2")])
@pytest.mark.parametrize("local", ["0", "1"])
@pytest.mark.any_mpi
def test_every_command_warns_once_on_a_host(arguments: tuple[str, ...], local: str) -> None:
    done = command(*arguments, OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK=local)
    assert done.returncode == 0
    assert done.stderr.count("warning: 4 processes were started, and each is alone") == (local == "0")


@pytest.mark.any_mpi
def test_the_version() -> None:
    assert command("--version").stdout == f"mpiattn {mpiattn.__version__}\n"
    root = Path(__file__).parents[1]
    assert f"\nversion: {mpiattn.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {mpiattn.__version__}\n" in (root / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.any_mpi
def test_lines_on_standard_error_come_whole(unbuffered: str, tmp_path: Path) -> None:
    """What a launcher reads at once ends with a line's end: it puts what is on standard output after it."""
    (tmp_path / "zeros.py").write_text("def attention(q, k, v, **more):\n    return 0 * q, 0 * q[..., 0]\n")
    words = ("--module", "zeros:attention", "--forward-only", "--case", "mask=full tokens=4")
    reader, writer = os.pipe2(os.O_DIRECT)  # what is written at once is read at once
    done = subprocess.run(
        [sys.executable, "-m", "mpiattn", "conformance", *words], stdout=subprocess.DEVNULL, stderr=writer,
        cwd=tmp_path, env=inherited() | {"PYTHONUNBUFFERED": unbuffered}, check=False, timeout=90,
    )  # fmt: skip
    os.close(writer)
    pieces = list(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    assert done.returncode == 1 and any(piece.count(b"\n") > 1 for piece in pieces)
    assert all(piece.endswith(b"\n") and piece.strip() for piece in pieces), pieces


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.any_mpi
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """As a shell or a scheduler closes them: the work is done all the same."""
    words = f"-m mpiattn run --algorithm ring --tokens 16 --output {tmp_path / 'a.npz'}"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {words} {closed}"],
        env=inherited(), capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert (tmp_path / "a.npz").exists()


@pytest.mark.any_mpi
def test_characters_that_an_encoding_has_not(tmp_path: Path) -> None:
    done = command(
        "run", "--algorithm", "ring", "--tokens", "16", "--output", str(tmp_path / "\xe9.npz"), PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stderr) == (0, "") and "\\xe9.npz: out, lse" in done.stdout
    assert (tmp_path / "\xe9.npz").exists()
