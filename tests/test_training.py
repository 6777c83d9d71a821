"""Training: the same losses on any ranks and by every algorithm; checkpoints that survive; what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import environ, mpiexec, mpiexec_path
from small_llama import toml

from mpiattn.algorithms.sharing import SHARE_TOKENS
from mpiattn.errors import InputError, WriteError
from mpiattn.models import checkpoint
from mpiattn.models.adamw import AdamW, clip
from mpiattn.models.plan import Plan
from mpiattn.models.training import Trainer

MODEL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3,
}  # fmt: skip
TEXT = (Path(__file__).parent.parent / "LICENSE").read_bytes()
SMALL = Plan.from_tables(
    {"model": MODEL, "training": {"steps": 8, "tokens": 13, "batch": 4, "warmup": 2, "dtype": "float64"}}
)


def plan(**changed: Any) -> Plan:
    tables = SMALL.to_tables()
    return Plan.from_tables({**tables, "training": {**tables["training"], **changed}})


def losses(comm: Any, steps: int, given: Plan = SMALL, **options: Any) -> list[float]:
    trainer = Trainer(comm, given, TEXT, **options)
    result = [trainer.train() for _ in range(steps)] + [trainer.validate(2)]
    trainer.free()
    return result


def alone() -> Any:
    from mpi4py import MPI

    return MPI.COMM_SELF


@pytest.mark.mpi(sizes=[1, 2, 4])
def test_losses_are_those_of_one_rank(comm: Any) -> None:
    right = losses(alone(), 3, algorithm="ring")
    assert right[2] < right[0] < np.log(256) + 0.3
    for name in SHARE_TOKENS:
        assert losses(comm, 3, algorithm=name) == pytest.approx(right, rel=1e-12)
    if comm.Get_size() > 1:
        assert losses(comm, 3, data=2) == pytest.approx(right, rel=1e-12)
    assert losses(comm, 3, plan(recompute=True), layout="striped") == pytest.approx(right, rel=1e-12)
    again = losses(comm, 3, algorithm="mesh")
    assert losses(comm, 3, algorithm="mesh") == again  # to the bit
    assert losses(comm, 3, plan(seed=1))[0] != right[0]


@pytest.mark.mpi(sizes=[1, 2, 4])
def test_bfloat16_with_weights_in_float32(comm: Any, mpi_tmp_path: Path) -> None:
    """Steps that are too small for bfloat16 add up, over the end of a run as well."""
    wide, narrow = (plan(dtype=dtype, learning_rate=1e-5, steps=16) for dtype in ("float32", "bfloat16"))
    one = Trainer(alone(), wide, TEXT, algorithm="ring")
    start = flat(one)
    right = [one.train() for _ in range(16)] + [one.validate(2)]
    trainer = Trainer(comm, narrow, TEXT)
    found = [trainer.train() for _ in range(8)]
    path = checkpoint.save(mpi_tmp_path / str(comm.Get_rank()), trainer, {})
    trainer.free()
    trainer = Trainer(comm, narrow, TEXT)
    checkpoint.resume(path, trainer)
    found += [trainer.train() for _ in range(8)] + [trainer.validate(2)]
    assert found == pytest.approx(right, rel=2e-4)
    assert np.corrcoef(flat(one) - start, flat(trainer) - start)[0, 1] > 0.999
    for name, weight in trainer.weights.items():
        rounded = trainer.llama.weights[name]
        assert weight.dtype == np.float32 and rounded.dtype.name == "bfloat16"
        assert np.array_equal(rounded, weight.astype(rounded.dtype))
    one.free()
    trainer.free()


def flat(trainer: Trainer) -> Any:
    """Return all weights in a row."""
    return np.concatenate([weight.reshape(-1) for weight in trainer.weights.values()]).astype(np.float64)


@pytest.mark.mpi(sizes=[1, 2])
def test_what_is_not_finite_moves_no_weight(comm: Any) -> None:
    """The loss of one rank's tokens, and gradients too large for the sum of their squares."""
    for method, message in (
        ("forward", "step 2: the loss is nan"),
        ("backward", "the norm of the gradients is (inf|nan)"),
    ):
        trainer = Trainer(comm, SMALL, TEXT)
        trainer.train()
        weights, right = flat(trainer), getattr(trainer.attention, method)

        def spoilt(*arrays: Any, right: Any = right, factor: float = np.inf if method == "forward" else 1e200) -> Any:
            first, *others = right(*arrays)
            return first * (factor if comm.Get_rank() == 0 else 1), *others

        setattr(trainer.attention, method, spoilt)
        with pytest.raises(InputError, match=message):
            trainer.train()
        assert np.array_equal(flat(trainer), weights) and trainer.step == 1
        trainer.free()


@pytest.mark.mpi(sizes=[4])
def test_fewer_tokens_than_ranks(comm: Any) -> None:
    assert losses(comm, 2, plan(tokens=3)) == pytest.approx(losses(alone(), 2, plan(tokens=3)), rel=1e-12)


def test_adamw_by_hand() -> None:
    """Two steps of one matrix and one vector, and a norm that is clipped."""
    weights = {"w": np.array([[2.0]]), "b": np.array([2.0])}
    adam = AdamW(weights, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.1)
    adam.step({"w": np.array([[3.0]]), "b": np.array([3.0])}, 0.5)
    assert weights["w"][0, 0] == pytest.approx(2 * 0.95 - 0.5) and weights["b"][0] == pytest.approx(1.5)
    adam.step({"w": np.array([[-1.0]]), "b": np.array([-1.0])}, 0.5)
    mean, square = (0.5 * 1.5 - 0.5) / 0.75, (0.75 * 2.25 + 0.25) / (1 - 0.75**2)
    assert weights["b"][0] == pytest.approx(1.5 - 0.5 * mean / np.sqrt(square))
    gradients = {"w": np.array([[3.0]]), "b": np.array([4.0])}
    assert clip(gradients, 10) == 5 and gradients["b"][0] == 4
    assert clip(gradients, 1) == 5 and gradients["w"][0, 0] == pytest.approx(0.6)


def test_learning_rate() -> None:
    given = plan(steps=100, warmup=10, learning_rate=1.0, lowest=0.1)
    rates = [given.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# Checkpoints


def trainer_after(comm: Any, steps: int, given: Plan = SMALL, **options: Any) -> Trainer:
    trainer = Trainer(comm, given, TEXT, **options)
    for _ in range(steps):
        trainer.train()
    return trainer


@pytest.mark.mpi(sizes=[1, 2, 4])
def test_resume(comm: Any, mpi_tmp_path: Path) -> None:
    """To the bit on the same ranks; within rounding on others and with another algorithm."""
    whole = trainer_after(comm, 6)
    first = trainer_after(comm, 3)
    if comm.Get_rank() == 0:
        checkpoint.save(mpi_tmp_path, first, {"train": [1.0]})
        checkpoint.save(mpi_tmp_path / "one", trainer_after(alone(), 3), {})
    comm.Barrier()
    for path, name, exact in [
        (mpi_tmp_path, "mesh", True), (mpi_tmp_path, "ulysses", False), (mpi_tmp_path / "one", "mesh", False),
    ]:  # fmt: skip
        second = Trainer(comm, plan(recompute=not exact), TEXT, name)
        assert checkpoint.resume(path / "step-00000003", second) == ({"train": [1.0]} if path == mpi_tmp_path else {})
        assert second.step == 3
        for _ in range(3):
            second.train()
        for name, weight in whole.llama.weights.items():
            assert np.allclose(second.llama.weights[name], weight, rtol=0, atol=0 if exact else 1e-9)
        second.free()
    whole.free()
    first.free()


@pytest.mark.mpi(sizes=[1])
def test_checkpoints_are_whole_or_not_there(comm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_after(comm, 1)
    for _ in range(4):
        checkpoint.save(tmp_path, trainer, {})
        trainer.train()
    names = [path.name for path in checkpoint.complete(tmp_path)]
    assert names == ["step-00000003", "step-00000004"] == sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WriteError, match=r"step-00000005: No space left"):
        checkpoint.save(tmp_path, trainer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    monkeypatch.undo()
    (tmp_path / ".part-step-00000009").mkdir()  # of a run that was killed
    (tmp_path / ".part-step-00000009" / "state.json").write_text("{}")
    assert [path.name for path in checkpoint.complete(tmp_path)] == names
    checkpoint.save(tmp_path, trainer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.mpi(sizes=[1])
def test_bad_checkpoints(comm: Any, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, trainer_after(comm, 1), {})
    other = {**SMALL.to_tables(), "model": {**MODEL, "hidden_size": 36, "max_position_embeddings": 13}}
    with pytest.raises(InputError, match="hidden_size is 36 in the config and 24 in the checkpoint, head_dim is 6"):
        checkpoint.resume(path, Trainer(comm, Plan.from_tables(other), TEXT))
    weights, state = path / "model.safetensors", path / "state.json"
    data, text = weights.read_bytes(), state.read_text()
    for content, message in ((data[:-8], "missing or cut"), (b"\xff" * len(data), "is damaged")):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=message):
            checkpoint.resume(path, Trainer(comm, SMALL, TEXT))
    weights.unlink()
    with pytest.raises(InputError, match="missing or cut"):
        checkpoint.resume(path, Trainer(comm, SMALL, TEXT))
    whole = json.loads(text)
    parts = [
        json.dumps({key: value for key, value in whole.items() if key != name}) for name in whole if name != "text"
    ]
    lists = [json.dumps({**whole, name: []}) for name in ("plan", "step")]
    for damaged in (text[:-30], "[]", "{}", *parts, *lists):
        state.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            checkpoint.resume(path, Trainer(comm, SMALL, TEXT))


@pytest.mark.mpi(sizes=[1])
def test_a_run_goes_on_as_it_began(comm: Any, tmp_path: Path) -> None:
    """Model, text and sequences must be the same; how far the run goes, and what the optimiser takes, need not."""
    path = checkpoint.save(tmp_path, trainer_after(comm, 1), {})
    for changed in (
        {"tokens": 12}, {"batch": 2}, {"seed": 5}, {"held_out": 0.2}, {"dtype": "float32"},
    ):  # fmt: skip
        [(name, value)] = changed.items()
        message = f"folder: {name} is {value} in the config and {getattr(SMALL, name)} in the checkpoint$"
        with pytest.raises(InputError, match=message):
            checkpoint.resume(path, Trainer(comm, plan(**changed), TEXT))
    with pytest.raises(InputError, match=r"batch is 2 .*, seed is 5 .* 0 in the checkpoint, the text is another one$"):
        checkpoint.resume(path, Trainer(comm, plan(seed=5, batch=2), TEXT[:-1] + b"?"))
    checkpoint.resume(path, Trainer(comm, plan(steps=99, recompute=True), TEXT))
    tuned = {"learning_rate": 1e-4, "lowest": 0.2, "warmup": 3, "beta1": 0.8, "beta2": 0.8, "eps": 1e-7, "clip": 2.0}
    checkpoint.resume(path, Trainer(comm, plan(**tuned), TEXT))
    told = [
        f"{name} is {value} in the config and {getattr(SMALL, name)} in the checkpoint" for name, value in tuned.items()
    ]
    assert sorted(checkpoint.retuned(path, plan(**tuned))) == sorted(told) and not checkpoint.retuned(path, SMALL)
    state = json.loads((path / "state.json").read_text())
    del state["text"], state["plan"]["training"]["recompute"]  # as it was written before there was a checksum
    (path / "state.json").write_text(json.dumps(state))
    checkpoint.resume(path, Trainer(comm, SMALL, TEXT[:-1]))


@pytest.mark.mpi(sizes=[1])
@pytest.mark.parametrize("held_out", [0.0, 0.03, 0.1, 0.29, 0.5, 0.7, 0.99])
def test_a_text_that_is_long_enough(comm: Any, held_out: float) -> None:
    """A text as long as the error of a shorter one asks for is taken."""
    given = plan(held_out=held_out)
    with pytest.raises(InputError, match=r"a sequence takes 14: with held_out = .* it must have \d+$") as error:
        Trainer(comm, given, TEXT[:13])
    Trainer(comm, given, TEXT[: int(str(error.value).split()[-1])]).free()


@pytest.mark.mpi(max_size=2)
def test_trainers_that_do_not_fit(comm: Any) -> None:
    wrong: list[tuple[bytes, dict[str, Any], str]] = [
        (TEXT, {"data": 3}, "a divisor of"),
        (TEXT, {"data": 0}, "a divisor of"),
        (TEXT[:12], {}, "bytes to train on; a sequence takes 14"),
        (TEXT[:100], {}, "10 bytes to validate on"),
        (TEXT, {"algorithm": "tensor_parallel"}, "does not share out tokens"),
    ]
    for text, options, message in wrong:
        with pytest.raises(InputError, match=message):
            Trainer(comm, SMALL, text, **options)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"modle": {}}, "unknown table 'modle'; did you mean model?"),
        ({"training": {"learningrate": 1.0}}, "unknown key of .training. 'learningrate'; did you mean learning_rate?"),
        ({"model": {"vocab_size": 7}}, "unknown key of .model. 'vocab_size'"),
        ({"training": {"steps": "7"}}, "steps is of the type int"),
        ({"training": {"steps": 0}}, "steps is an integer above 0"),
        ({"training": {"recompute": 1}}, "recompute is of the type bool"),
        ({"training": {"clip": 0.0}}, "clip is a number above 0"),
        ({"training": {"beta1": 1.0}}, "beta1 is 0 or more and less than 1, got 1.0"),
        ({"training": {"held_out": 1.0}}, "held_out is 0 or more and less than 1, got 1.0"),
        ({"training": {"lowest": 1.5}}, "lowest is a number from 0 to 1, got 1.5"),
        ({"training": 3}, ".training. is a table of names and values, got 3"),
        ({"training": {"dtype": "int8"}}, "dtype 'int8': choose from"),
        ({"training": {"tokens": 99}, "model": {"max_position_embeddings": 98}}, "more than max_position_embeddings"),
        ({"model": {"num_attention_heads": 5}}, "num_attention_heads"),
    ],
)
def test_bad_plans(tables: dict[str, Any], message: str) -> None:
    given = {"model": {**MODEL, **tables.pop("model", {})}, **tables}
    with pytest.raises(InputError, match=message):
        Plan.from_tables(given)


def test_byte_tokenizer() -> None:
    """A letter of its own for each byte, those that can be seen their own."""
    letters = checkpoint.byte_tokenizer()["model"]["vocab"]
    assert sorted(letters.values()) == list(range(256)) and letters["A"] == 65 and letters["Ġ"] == 32


# The command

CONFIG = toml(steps=40, tokens=16, batch=2)


def train(n: int, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "small.toml").write_text(CONFIG)
    (folder / "text").write_bytes(TEXT)
    files = ("--text", folder / "text", "--config", folder / "small.toml")
    return mpiexec(n, sys.executable, "-m", "mpiattn", "train", *files, *more, timeout=90)


@pytest.mark.any_mpi
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = train(2, tmp_path, "--output", str(out), "--every", "20", "--plot", str(tmp_path / "curve.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s  waiting") == 2 and "validation" in done.stdout
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"
    assert len(json.loads((out / "losses.json").read_text())["train"]) == 40
    again = train(2, tmp_path, "--output", str(out))
    assert again.returncode == 2 and again.stderr.count("error:") == 1 and "go on with --resume" in again.stderr
    (tmp_path / "text").write_bytes(b"short")
    files = ("--text", tmp_path / "text", "--config", tmp_path / "small.toml")
    short = mpiexec(2, sys.executable, "-m", "mpiattn", "train", *files)
    assert short.returncode == 2 and short.stderr.count("error:") == 1 and "5 bytes" in short.stderr


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
@pytest.mark.any_mpi
def test_killed_and_resumed(tmp_path: Path, kills: int) -> None:
    """Killed at random moments, a run ends with the losses of one that was left alone, to the bit."""
    assert train(2, tmp_path, "--output", str(tmp_path / "alone")).returncode == 0
    draws = random.Random(kills)
    out, argv = tmp_path / "killed", [mpiexec_path(), "-n", "2", sys.executable, "-m", "mpiattn", "train"]
    argv += ["--text", str(tmp_path / "text"), "--config", str(tmp_path / "small.toml")]
    argv += ["--output", str(out), "--every", "1", "--resume"]
    unfinished = 0
    for _ in range(kills):
        done = len(checkpoint.complete(out)) and int(checkpoint.complete(out)[-1].name[-8:])
        with subprocess.Popen(argv, env=environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            deadline = time.monotonic() + 60
            while job.poll() is None and time.monotonic() < deadline:  # until it has got on, then a moment more
                found = checkpoint.complete(out)
                if found and int(found[-1].name[-8:]) > done:
                    break
                time.sleep(0.005)
            time.sleep(draws.random() * 0.05)
            unfinished += job.poll() is None
            for process in _below(job.pid):
                os.kill(process, signal.SIGKILL)
            job.kill()
    assert unfinished >= 1
    assert train(2, tmp_path, "--output", str(out), "--every", "1", "--resume").returncode == 0
    both = [json.loads((tmp_path / name / "losses.json").read_text())["train"] for name in ("alone", "killed")]
    assert len(both[0]) == 40 and both[0] == both[1]


def _below(process: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    found = []
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [*_below(child), child]
    return found
