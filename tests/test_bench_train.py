"""The benchmark of training: the same training by every algorithm, and a prediction that bytes explain."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import pytest
from launch import mpiexec

from mpiattn.commands.bench import train
from mpiattn.commands.bench.train_step import predict
from mpiattn.errors import InputError
from mpiattn.machines.machine import Link, Machine, Rates
from mpiattn.models.plan import Plan

SMALL = ("--tokens", "32", "--d-model", "8", "--heads", "2", "--layers", "1")


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


def plan(*words: str) -> Plan:
    return train.given(asked(*words))[0]


@pytest.mark.any_mpi
def test_bench_train(tmp_path: Path) -> None:
    words = ("--steps", "3", "--machine", "laptop", "--seed", "1", "--json", tmp_path / "t.json")
    done = mpiexec(2, sys.executable, "-m", "mpiattn", "bench", "train", *SMALL, *words)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "t.json").read_text())
    *results, alone = document["results"]
    assert [one["name"] for one in document["results"]] == ["ring", "mesh", "ulysses", "alone"]
    assert alone["losses"] != results[0]["losses"] and "predicted" not in alone
    assert all(0 < rest < whole for rest, whole in zip(alone["others"], alone["seconds"], strict=True))  # no blocks
    for one in results:
        assert one["losses"] == pytest.approx(results[0]["losses"], rel=1e-5)
        assert one["losses"][0] == pytest.approx(5.545, abs=0.05)  # log 256: nothing is known of random bytes
        assert one["rate"] == pytest.approx(16 / statistics.median(one["seconds"]))
        assert all(0 < share < 1 for share in one["waiting"]) and len(one["waiting"]) == 3
        assert one["predicted"] == pytest.approx(16 / (one["virtual"] + statistics.median(alone["others"])))
        assert f"{one['predicted']:.4g}" in done.stdout and f"{one['rate']:.4g}" in done.stdout


@pytest.mark.any_mpi
def test_without_a_machine_nothing_is_predicted() -> None:
    done = mpiexec(1, sys.executable, "-m", "mpiattn", "bench", "train", *SMALL, "--steps", "1", "--batch", "2")
    assert done.returncode == 0 and "tokens a step 2 x 32" in done.stdout and "predicted" not in done.stdout


def network(bandwidth: float) -> Machine:
    """Return a machine on which nothing but bytes takes time."""
    fast = Rates((1,), (1e18,), (1e18,))
    return Machine("wires", 1, 1e9, 1e18, {"network": Link(0.0, bandwidth)}, {"float32": fast})


@pytest.mark.parametrize(("name", "travelling"), [("ring", 18), ("mesh", 11), ("ulysses", 6)])
def test_prediction_is_of_all_bytes(name: str, travelling: int) -> None:
    """Of attention (forward and backward, in shares of a rank's queries), and of the sum of the gradients."""
    given = plan("--tokens", "256", "--d-model", "32", "--layers", "2")
    weights = 256 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 85 + 2 * 32) + 32
    nbytes = 4 * (2 * travelling * 64 * 32 + 1.5 * weights)
    assert predict(network(1e6), 4, given, (name, {})) == pytest.approx(nbytes / 1e6, rel=0.05)


def test_sizes_and_config(tmp_path: Path) -> None:
    given = plan("--kv-heads", "2", "--batch", "3", "--seed", "7")
    assert (given.tokens, given.batch, given.seed, given.model.hidden_size) == (1024, 3, 7, 128)
    assert (given.model.num_attention_heads, given.model.num_key_value_heads, given.model.num_hidden_layers) == (
        4,
        2,
        2,
    )
    config = Path(__file__).parents[1] / "benchmarks/training/small.toml"
    assert plan("--config", str(config)).model.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config small.toml --d-model 64", "--config and --d-model exclude each other"),
        ("--config small.toml --seed 0", "--config and --seed exclude each other"),
        ("--config missing.toml", "missing.toml: no such file"),
        ("--steps 0", "--steps 0: at least 1"),
        ("--layers 0", "--layers, --d-model, --heads and --kv-heads are at least 1"),
        ("--d-model 20 --heads 4", "a multiple of 2 x --heads 4"),
        ("--heads 4 --kv-heads 3", "--heads 4 must be a multiple of --kv-heads 3"),
        ("--machine nowhere", "no machine 'nowhere'"),
        ("--machine a100-ib", "has no rates for float32"),
    ],
)
def test_refused(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train.given(asked(*words.split()))
