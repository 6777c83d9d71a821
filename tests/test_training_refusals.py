"""What `mpiattn train` refuses, and a full disk: the same error on every rank, and all files as they were."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_training import CONFIG, TEXT

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
        ("hidden_size = 16", "hidden_size = 24", "step-00000040 is the checkpoint of another model"),
        ("steps", "stepz", "unknown key of .training. 'stepz'; did you mean steps?"),
        ("hidden_size = 16", "hidden_size = 1000000000", "to train this model takes .* bytes, and this machine has"),
        ("steps = 60", "steps = 60\nweight_decay = nan", "warmup, weight_decay and seed are numbers, at least 0"),
        ("hidden_size", "hiden_size", "unknown key of .model. 'hiden_size'; did you mean hidden_size?"),
    ):
        refused(comm, InputError, message, mpi_tmp_path, longer.replace(old, new))
    refused(comm, InputError, "15 bytes to train on; a sequence takes 17", mpi_tmp_path, longer, TEXT[:16])
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
