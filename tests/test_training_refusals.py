"""What `mpiattn train` refuses, and a full disk: the same error on every rank, and all files as they were."""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_training import CONFIG, TEXT

from mpiattn.algorithms.sharing import SHARE_TOKENS
from mpiattn.commands.train import command
from mpiattn.errors import InputError, WriteError
from mpiattn.models import checkpoint


def train(comm: Any, folder: Path, config: str = CONFIG, text: bytes = TEXT) -> None:
    """Train as the command does, from the last checkpoint in `folder / "out"`, if any."""
    if comm.Get_rank() == 0:
        (folder / "small.toml").write_text(config)
        (folder / "text").write_bytes(text)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    files = ["--text", str(folder / "text"), "--config", str(folder / "small.toml"), "--output", str(folder / "out")]
    command.main(parser.parse_args([*files, "--resume", "--every", "20"]), comm)


def files(folder: Path) -> dict[str, bytes]:
    """Return all that a folder holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def disk_with_room(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes: the system refuses what is written after them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(comm: Any, kind: type[Exception], message: str, folder: Path, *given: Any) -> None:
    """Check that training raises the same error on every rank, and leaves all that it has written before."""
    before = files(folder / "out")
    comm.Barrier()
    with pytest.raises(kind, match=message) as error:
        train(comm, folder, *given)
    assert set(comm.allgather(str(error.value))) == {str(error.value)}
    assert files(folder / "out") == before
    comm.Barrier()


@pytest.mark.mpi(sizes=[1, 2, 4])
def test_nothing_is_overwritten(comm: Any, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(comm, mpi_tmp_path)
    names = {path.split("/")[0] for path in files(mpi_tmp_path / "out")}
    assert names == {"step-00000020", "step-00000040", command.CURVE}
    longer = CONFIG.replace("steps = 40", "steps = 60")
    for old, new, message in (
        ("hidden_size = 16", "hidden_size = 24", "step-00000040 goes on .* hidden_size is 24 in the config and 16 in"),
        ("tokens = 16", "tokens = 12", "folder: tokens is 12 in the config and 16 in the checkpoint$"),
        (longer, "model = 3", "small.toml: .model. is a table of names and values, got 3"),
        (longer, "[[model]]", "small.toml: .model. is a table of names and values, got"),
        ("steps", "stepz", "unknown key of .training. 'stepz'; did you mean steps?"),
        ("hidden_size = 16", "hidden_size = 1000000000", "to train this model takes .* bytes, and this machine has"),
        ("steps = 60", "steps = 60\nweight_decay = nan", "warmup, weight_decay and seed are numbers, at least 0"),
        ("hidden_size", "hiden_size", "unknown key of .model. 'hiden_size'; did you mean hidden_size?"),
    ):
        refused(comm, InputError, message, mpi_tmp_path, longer.replace(old, new))
    refused(
        comm,
        InputError,
        "15 bytes to train on; a sequence takes 17: with held_out = 0.1",
        mpi_tmp_path,
        longer,
        TEXT[:16],
    )
    save = checkpoint.save
    for room in (0, 10_000, 30_000):  # none; for a part of the weights; for them, but not for all of AdamW's means

        def limited(*given: Any, room: int = room) -> Path:
            with disk_with_room(room):
                return save(*given)

        monkeypatch.setattr(checkpoint, "save", limited)
        refused(comm, WriteError, "step-00000060: .*File too large", mpi_tmp_path, longer)
    monkeypatch.undo()
    train(comm, mpi_tmp_path, longer)
    assert "step-00000060" in {path.name for path in (mpi_tmp_path / "out").iterdir()}


@pytest.mark.mpi(max_size=2)
def test_what_is_resumed(comm: Any, mpi_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How far the run is; a curve that was damaged; the entropy of the text that is trained on."""
    train(comm, mpi_tmp_path)
    for config, said in ((CONFIG, "40 of 40"), (CONFIG.replace("= 40", "= 30"), "30 of 30")):
        capsys.readouterr()
        train(comm, mpi_tmp_path, config)
        ends = f"step-00000040: {said} steps are done; to go on, give [training] more steps\n"
        assert capsys.readouterr().out.endswith(ends if comm.Get_rank() == 0 else "")
    state = mpi_tmp_path / "out" / "step-00000040" / checkpoint.STATE
    whole = json.loads(state.read_text())
    comm.Barrier()
    write(comm, state, {**whole, "losses": {"train": []}})
    refused(comm, InputError, "step-00000040 is damaged: it has no curve of losses", mpi_tmp_path)
    write(comm, state, {key: value for key, value in whole.items() if key != "text"})
    other = TEXT.upper()
    train(comm, mpi_tmp_path, CONFIG, other)
    curve = json.loads((mpi_tmp_path / "out" / command.CURVE).read_text())
    assert curve["unigram"] != whole["losses"]["unigram"] and curve["train"] == whole["losses"]["train"]


def write(comm: Any, path: Path, document: dict[str, Any]) -> None:
    """Write a file, once."""
    if comm.Get_rank() == 0:
        path.write_text(json.dumps(document))
    comm.Barrier()


@pytest.mark.mpi(max_size=2)
def test_the_output_is_a_folder(comm: Any, mpi_tmp_path: Path) -> None:
    if comm.Get_rank() == 0:
        (mpi_tmp_path / "out").write_text("")
    refused(comm, InputError, "out: is a file, not a folder", mpi_tmp_path)


@pytest.mark.parametrize("name", ["auto", "decode", "tensor_parallel", "messh"])
def test_algorithms_that_are_offered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--text", "t", "--config", "c", "--algorithm", name])
    offered = capsys.readouterr().err.partition("choose from ")[2].strip().split(", ")
    assert offered == list(SHARE_TOKENS)
