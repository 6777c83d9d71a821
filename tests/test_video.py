"""examples/video.py: the same losses on any ranks, gradients, order by attention alone, and clips from files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from launch import mpiexec
from test_examples import EXAMPLES, example

FRAMES = 64


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return example("video")


def alone() -> Any:
    from mpi4py import MPI

    return MPI.COMM_SELF


@pytest.mark.mpi(sizes=[1, 3, 4])
@pytest.mark.parametrize("attention", [True, False])
def test_losses_are_those_of_one_rank(comm: Any, program: ModuleType, attention: bool) -> None:
    one, all_ranks = (program.Video(ranks, attention, np.float64) for ranks in (alone(), comm))
    right = [one.train(FRAMES, 4) for _ in range(4)]
    losses = [all_ranks.train(FRAMES, 4) for _ in range(4)]
    assert len({loss for loss, _ in right}) == 4
    assert np.allclose(losses, right, rtol=1e-12, atol=0)
    assert all_ranks.held_out(FRAMES, 2) == one.held_out(FRAMES, 2)
    all_ranks.layer.free()


@pytest.mark.mpi(sizes=[1, 2])
def test_gradients(comm: Any, program: ModuleType) -> None:
    """Of each weight, against central differences in a random direction."""
    video = program.Video(comm, dtype=np.float64)
    d_logits = np.random.default_rng(1).standard_normal((program.BATCH, 2))
    logits, _, kept = video.batch(FRAMES, program.TRAINING, 0)
    gradients = video.backward(d_logits, kept)
    assert gradients.keys() == video.weights.keys() and logits.shape == d_logits.shape
    for name, weight in video.weights.items():
        ends, way = [], np.random.default_rng(2).standard_normal(weight.shape)
        for step in (1e-5, -2e-5):
            weight += step * way
            ends.append((video.batch(FRAMES, program.TRAINING, 0)[0] * d_logits).sum())
        weight += 1e-5 * way
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((gradients[name] * way).sum(), rel=1e-5, abs=1e-8), name
    video.layer.free()


@pytest.mark.mpi(sizes=[1])
def test_order_comes_in_by_attention_alone(comm: Any, program: ModuleType) -> None:
    """Played backwards, a clip has the other answer; without attention the model can't tell."""
    forwards, answers = program.clips(FRAMES, program.TRAINING, 0)
    backwards = forwards[:, ::-1].copy()
    halves = forwards.reshape(-1, FRAMES, 8, 2, 4).mean(axis=(2, 4))  # (clips, frames, 2): how bright
    left, right = halves.argmax(axis=1).T
    assert np.array_equal(left < right, answers)
    assert 0 < answers.sum() < len(answers)
    for attention in (True, False):
        video = program.Video(comm, attention, np.float64)
        one, other = (video.forward(clip.astype(np.float64), FRAMES)[0] for clip in (forwards, backwards))
        assert np.allclose(one, other, rtol=1e-12, atol=1e-12) is not attention
        video.layer.free()


def run(*options: str | Path) -> str:
    done = mpiexec(4, sys.executable, EXAMPLES / "video.py", "--frames", str(FRAMES), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def share(printed: str) -> float:
    """Return which share of the clips held out was judged rightly."""
    found = re.search(r"clips held out right: ([\d.]+)%", printed)
    assert found is not None, printed
    return float(found[1])


@pytest.mark.any_mpi
def test_program() -> None:
    """With few frames, few steps will do."""
    assert share(run("--steps", "40")) > 95
    assert 40 < share(run("--steps", "40", "--no-attention")) < 60


@pytest.mark.any_mpi
def test_clip_of_a_file(program: ModuleType, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v3")
    clips, answers = program.clips(FRAMES, program.HELD_OUT, 0)
    grey = (20 * clips + 80).clip(0, 255).astype(np.uint8).reshape(-1, FRAMES, 8, 8)
    large = grey.repeat(5, axis=2).repeat(4, axis=3)
    for answer in (0, 1):
        number = list(answers).index(answer)
        imageio.imwrite(path := tmp_path / f"{answer}.gif", large[number])
        read = program.read(path)
        assert read.shape == (1, FRAMES, 64) and np.corrcoef(read.ravel(), clips[number].ravel())[0, 1] > 0.99
        assert f"{FRAMES} frames: the {('right', 'left')[answer]} flash came first" in run(
            "--steps", "30", "--clip", path
        )
    imageio.imwrite(path := tmp_path / "small.gif", grey[0, :, :5])
    with pytest.raises(ValueError, match="smaller than 8 x 8"):
        program.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--frames", "31"], "two flashes take 32 frames"), (["--clip", __file__], "--clip .*test_video.py: ")],
)
@pytest.mark.any_mpi
def test_what_is_refused(options: list[str], message: str) -> None:
    done = mpiexec(2, sys.executable, EXAMPLES / "video.py", *options)
    assert done.returncode != 0 and done.stderr.count("error:") == 1 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
