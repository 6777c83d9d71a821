"""The documents' tables and figures: their numbers where they cost little, and what the command says."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpiattn.commands import cli
from mpiattn.commands.documents import communication, complexity, lab, setting
from mpiattn.commands.documents.claims import COMMUNICATION, TRAINING
from mpiattn.commands.documents.command import REPORTS, add_arguments, main
from mpiattn.errors import InputError


def called(report: str, folder: Path, *options: str, comm: Any = None) -> dict[str, Any]:
    """Make a report and return what it wrote as JSON."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args([report, "--output", str(folder), *options]), comm) == 0
    document: dict[str, Any] = json.loads((folder / f"{report}.json").read_text())
    text = (folder / f"{report}.md").read_text()
    assert text.startswith(f"# {document['title']}\n\n`{document['command']}`\n")
    return document


def test_sample_code(tmp_path: Path) -> None:
    """Each row has a number that fails."""
    rows = called("samples", tmp_path)["rows"]
    assert len(rows) == 11 and all(re.search(r"\d", row["what it gives"]) for row in rows)
    assert "the weights of a query sum to 4, not 1" in rows[1]["what it gives"]
    errors = [float(error) for row in rows for error in re.findall(r"^error ([\d.]+)", row["what it gives"])]
    assert len(errors) == 6 and min(errors) > 0.5
    assert float(rows[1]["right instead"].split("error ")[1]) < 1e-14


def test_formulas_of_complexity_are_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rows of log-sum-exps: one number of 4 bytes beside 128 of 2."""
    monkeypatch.setattr(complexity, "CASES", ((4096, 4), (8192, 16)))
    document = called("complexity", tmp_path)
    for tokens, ranks in complexity.CASES:
        *_, ring, mesh = document[f"{tokens} on {ranks}"]
        unit = tokens * setting.HIDDEN / ranks * 2 / 1e9
        a = b = int(ranks**0.5)
        volumes = [2 * (ranks - 1), (a - 1) * 3 + (b - 1) * 2]
        for row, chunks, messages in zip((ring, mesh), volumes, (ranks - 1, 3 * (a - 1)), strict=True):
            assert float(row["volume (GB)"]) == pytest.approx(chunks * unit, rel=0.02)
            assert row["messages"] == messages
            assert float(row["memory, run (GB)"]) == pytest.approx(float(row["memory by the formula (GB)"]), rel=0.02)


def test_claims_stand_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "DEVICES", (4,))
    rows = called("communication", tmp_path, "--machine", "h200-ib")["rows"]
    assert [row["article (GB/s)"] for row in rows] == ["1.2, 1.1", "-"]
    assert rows[0]["article: improvement"] == f"{COMMUNICATION[32, 4][2]} %"
    ring, mesh = map(float, rows[0]["received (GB)"].split(", "))
    assert rows[0]["mesh: less"] == f"{1 - mesh / ring:.0%}"
    assert {file.suffix for file in tmp_path.iterdir()} == {".md", ".json", ".png"}


def test_reasons_are_those_of_the_default_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "DEVICES", (4,))
    for options, said in (((), "Why it differs: the article's"), (("--machine", "ethernet"), "says it of its own")):
        called("communication", tmp_path, *options)
        text = (tmp_path / "communication.md").read_text()
        assert said in text and ("faster links" in text) == (not options)


def test_training_claims_have_the_articles_ratios() -> None:
    assert [round(mesh / ring, 2) for ring, mesh in TRAINING.values()] == [1.06, 1.17, 1.35, 1.72, 2.40]


@pytest.mark.mpi(min_size=2, max_size=4)
def test_the_lab_is_measured(comm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "LENGTHS", (64, 130))
    folder = Path(comm.bcast(str(tmp_path)))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args(["lab", "--output", str(folder), "--iterations", "1"]), comm) == 0
    if comm.Get_rank() == 0:
        rows = json.loads((folder / "lab.json").read_text())["rows"]
        assert [row["tokens"] for row in rows] == [64, 130]
        assert all(float(row["difference"]) < 1e-5 and float(row["standard (ms)"]) > 0 for row in rows)
        assert (folder / "lab.png").exists()


def test_bad_input(tmp_path: Path) -> None:
    for arguments, message in (
        (("lab",), "mpiexec -n 4 mpiattn documents lab"),
        (("training", "--machine", "laptop"), "no rate of matrix products for laptop: choose from a100-ib, h200-ib"),
        (("weak", "--machine", "nowhere"), "no machine 'nowhere'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            called(arguments[0], tmp_path, *arguments[1:])


def test_help_says_what_each_report_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["documents", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", text, re.MULTILINE) for name in (*REPORTS, "lab", "all"))
