"""`mpiattn train --elastic`: ranks are killed and the losses stay; where it is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import elastic_kills
import pytest
from launch import mpiexec, mpiexec_path
from small_llama import TINY

from mpiattn.errors import InputError, WriteError
from mpiattn.messages.connection import private
from mpiattn.models.plan import Plan
from mpiattn.models.training import Trainer
from mpiattn.trace.comm import TracedComm

PLAN = Plan.from_tables({"model": TINY, "training": {"steps": 4, "tokens": 12, "batch": 4, "dtype": "float64"}})
TEXT = (Path(__file__).parent.parent / "LICENSE").read_bytes()


@cache
def mpi() -> str:
    return subprocess.run([mpiexec_path(), "--version"], capture_output=True, text=True, check=True).stdout


def test_killed_down_to_one_rank(tmp_path: Path) -> None:
    """Rank 0 among them; the losses are those of a run that is left alone."""
    if "Open MPI" not in mpi():
        pytest.skip("only Open MPI goes on when a rank dies")
    steps, order = 600, [0, 2]
    right = elastic_kills.alone(tmp_path, steps)
    job = elastic_kills.disturbed(tmp_path, steps, 3, order, random.Random(0))
    assert elastic_kills.difference(job.curve["train"], right) < 1e-10, job.text
    lost = [(rank, death["time"]) for death in job.curve["deaths"] for rank in death["ranks"]]
    assert sorted(rank for rank, _ in lost) == order
    assert all(time > job.kills[order.index(rank)] for rank, time in lost)
    # A loaded machine may notice both at once, or the second before the step after the first is done.
    assert 1 <= job.text.count("after the death was noticed") <= job.text.count("lost in step") <= 2
    last = tmp_path / "disturbed" / f"step-{steps:08}"  # written by the one that is left
    assert json.loads((last / "state.json").read_text())["losses"]["train"] == job.curve["train"]
    assert f"saved {last}: --resume goes on from it" in job.text


def test_killed_where_it_matters(tmp_path: Path) -> None:
    """See dying.py."""
    if "Open MPI" not in mpi():
        pytest.skip("only Open MPI goes on when a rank dies")
    right = elastic_kills.alone(tmp_path, 8)
    _, _, _, *arguments = elastic_kills.command(tmp_path, 8, "--output", str(tmp_path / "out"))
    ring = "--elastic", "--algorithm", "ring"
    job: list[str | Path] = ["--with-ft", "ulfm", sys.executable, Path(__file__).parent / "dying.py", *arguments, *ring]
    done = mpiexec(4, *job, env={"PYTHONPATH": str(elastic_kills.ROOT)}, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    curve = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert elastic_kills.difference(curve["train"], right) < 1e-10, done.stdout
    assert [death["ranks"] for death in curve["deaths"]] == [[1], [2], [0]]
    assert "nan" not in done.stdout
    assert "rank 1, 2; 2 go on" in done.stdout and "rank 0; 1 go on" in done.stdout


def refused(*more: str) -> str:
    """Return the one error of a job without fault tolerance."""
    command = elastic_kills.command(Path(more[0]), 2, "--elastic", *more[1:])
    done = mpiexec(2, *command)
    errors = [line for line in done.stderr.splitlines() if line.startswith("mpiattn: error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    return errors[0]


def test_refused(tmp_path: Path) -> None:
    assert "started by: mpiexec --with-ft ulfm" in refused(str(tmp_path))
    assert "--timeout ends the job" in refused(str(tmp_path), "--timeout", "5")
    assert "does not go with shared_ring" in refused(str(tmp_path), "--algorithm", "shared_ring")
    assert "mesh without cols, rows" in refused(str(tmp_path), "--algorithm", "mesh:2x1")


# Without a death, with any MPI library


def elastic(comm: Any, told: list[str]) -> Any:
    from mpiattn.messages.surviving import SurvivingComm
    from mpiattn.models.elastic import Elastic

    traced = TracedComm(comm.Dup())
    return Elastic(traced, Trainer(SurvivingComm(traced), PLAN, TEXT), told.append)


@pytest.mark.mpi(sizes=[1, 3])
def test_no_rank_dies(comm: Any) -> None:
    told: list[str] = []
    one, other = elastic(comm, told), Trainer(comm, PLAN, TEXT)
    assert [one.step() for _ in range(3)] == [other.train() for _ in range(3)]
    assert not told and not one.deaths


@pytest.mark.mpi(sizes=[1, 3])
@pytest.mark.parametrize("kind", [InputError, WriteError])
def test_what_all_ranks_raise(comm: Any, kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("the same on all")

    one = elastic(comm, [])
    with pytest.raises(kind, match="the same on all"):
        one.commit(fail)
    assert one.commit(lambda: 3) == 3


@pytest.mark.mpi(sizes=[3])
@pytest.mark.parametrize("part", ["attend", "gradients"])
def test_a_step_that_fails(comm: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Neither its communicators nor those that they were made of are used again."""

    def fail(*_: object) -> None:
        raise RuntimeError("of the kernel")

    trainer = Trainer(comm, PLAN, TEXT)
    old = private(comm)
    monkeypatch.setattr(trainer.attention, part, fail)
    with pytest.raises(RuntimeError, match="of the kernel"):
        trainer.train()
    assert private(comm) is not old
    assert Trainer(comm, PLAN, TEXT).train() == pytest.approx(Trainer(comm, PLAN, TEXT).train(), rel=1e-12)
