"""algorithm="auto": the planner's choice on a communicator, the same and right on every rank."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import mpiexec
from safetensors.numpy import load_file
from test_connection import raises

import mpiattn
from mpiattn import arrays, machines, virtual
from mpiattn.algorithms import Attention
from mpiattn.commands import inputs
from mpiattn.conformance import oracle
from mpiattn.errors import InputError
from mpiattn.messages.hosts import by_host
from mpiattn.planner import Candidate, Choice
from mpiattn.planner.choice import here
from mpiattn.problems.mask import Causal
from mpiattn.trace.comm import TracedComm

SIZES: dict[str, Any] = {"tokens": 60, "heads": 4, "kv_heads": 2, "head_dim": 8}


def attend(comm: Any, **options: Any) -> tuple[list[float], str]:
    """Return the errors of out, dQ, dK, dV on rank 0, and what was chosen."""
    rng = np.random.default_rng(1)
    q, d_out = rng.standard_normal((2, 1, 4, 60, 8))
    k, v = rng.standard_normal((2, 1, 2, 60, 8))
    with mpiattn.auto(comm, **SIZES, dtype="float64", mask=Causal(), **options) as attention:
        own = [np.ascontiguousarray(array[:, :, attention.positions(60)]) for array in (q, k, v, d_out)]
        # What Ulysses and its relatives own goes by tokens as well: only where heads are shared out it does not.
        out, saved = attention.forward(*own[:3])
        gradients = attention.backward(own[3], saved)
        wholes = [mpiattn.gather(array, attention.comm, attention.layout) for array in (out, *gradients)]
        name = type(attention).__name__
    right = [oracle.attention(q, k, v, Causal())[0], *oracle.gradients(q, k, v, d_out, Causal())]
    if wholes[0] is None:
        return [], name
    return [oracle.error(whole, one) for whole, one in zip(wholes, right, strict=True) if whole is not None], name


@pytest.mark.mpi
def test_the_chosen_algorithm_is_the_same_on_every_rank_and_right(comm: Any) -> None:
    for options in ({}, {"machine": "ethernet"}, {"layout": "striped", "kernel": "numpy", "algorithms": ["ring"]}):
        for over in (comm, TracedComm(comm)):
            errors, name = attend(over, **options)
            assert set(comm.allgather(name)) == {name}
            assert comm.Get_rank() or max(errors) < 1e-10


@pytest.mark.mpi
def test_without_with(comm: Any) -> None:
    """As any algorithm; ranks in another order have one communicator, which ends with the caller's."""
    own = comm.Dup()
    q = np.ones((1, 4, 5, 8), np.float32)
    attention = mpiattn.auto(own, tokens=5 * comm.size, heads=4, head_dim=8, algorithms=["ring"])
    assert attention.forward(q, q, q)[0].shape == q.shape
    choice = mpiattn.choose(own, tokens=5 * comm.size, heads=4, head_dim=8, algorithms=["ring"])
    places = (0, *range(comm.size - 1, 0, -1))
    once, again = (dataclasses.replace(choice, places=places).attention(own) for _ in range(2))
    assert once.comm.Get_rank() == places[comm.rank] and (once.comm is again.comm)
    for each in (once, again):
        assert each.forward(q, q, q)[0].shape == q.shape
    own.Free()
    for each in (attention, once, again):
        raises(comm, partial(each.forward, q, q, q), "the communicator of this attention has been freed")


@pytest.mark.mpi
def test_every_rank_knows_the_plan(comm: Any) -> None:
    choice = mpiattn.choose(comm, **SIZES)
    assert len(set(comm.allgather(repr((choice.plan.best, choice.places))))) == 1
    assert choice.plan.ranks == comm.Get_size() and choice.plan.machine.name in machines.presets()
    assert [line.split(":")[0] for line in choice.explain()] == ["auto", "bytes", "time", "memory"]
    assert choice.arguments in choice.algorithm.variants(comm.Get_size())


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, r"4 heads can't share 3 K/V heads: choose one of \[1, 2, 4\]"),
        ({"tokens": 0}, "tokens must be a whole number, 1 or more, got 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"machine": "nowhere"}, "no machine 'nowhere': give the path of a TOML file, or one of"),
        ({"memory": 10.0}, "not even one token fits into 10 B a rank"),
        ({"memory": -1.0}, "memory must be more than 0 bytes, got -1.0"),
        ({"algorithms": ["spiral"]}, "unknown algorithm spiral"),
        ({"machine": "a100-ib", "dtype": "float64"}, "machine a100-ib has no rates for float64"),
    ],
)
def test_bad_input_on_every_rank(comm: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as hit:
        mpiattn.choose(comm, **{**SIZES, **change})
    assert len(set(comm.allgather(str(hit.value)))) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("arguments", [{**SIZES, "tokns": 60}, {"tokens": 60, "heads": 4}])
def test_unknown_and_missing_arguments(comm: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"tokns|head_dim"), mpiattn.auto(comm, **arguments):
        pass


def test_auto_hands_on_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """To `choose`, or to the algorithm; the defaults are theirs."""
    handed: dict[str, Any] = {}

    class Chosen:
        def attention(self, comm: Any, **options: Any) -> Any:
            handed.update(comm=comm, **options)
            return nullcontext()

    def recorded(comm: Any, **asked: Any) -> Chosen:
        handed.update(asked)
        return Chosen()

    own = inspect.signature(mpiattn.auto).parameters
    theirs = {**inspect.signature(Attention).parameters, **inspect.signature(mpiattn.choose).parameters}
    assert {name: (one.default, one.annotation) for name, one in theirs.items() if name != "own"} == {
        name: (one.default, one.annotation) for name, one in own.items()
    }
    monkeypatch.setattr("mpiattn.planner.choice.choose", recorded)
    with mpiattn.auto(**{name: name for name in own}):  # type: ignore[arg-type]
        assert handed == {name: name for name in own}


@pytest.mark.mpi(min_size=2)
def test_ranks_that_ask_for_different_plans(comm: Any) -> None:
    with pytest.raises(InputError, match=r"rank 1 asks for a plan of .*'tokens': 61.*, rank 0 of .*'tokens': 60"):
        mpiattn.choose(comm, **{**SIZES, "tokens": 61 if comm.Get_rank() == 1 else 60})


def test_ranks_in_another_order() -> None:
    """On 2 nodes of 4, a grid of 4 x 2 whose columns lie inside the nodes; ranks dealt out in turn."""
    nodes = machines.load("ethernet")

    def program(comm: Any) -> tuple[list[int], list[float], bool]:
        mixed = comm.Split(0, comm.Get_rank() % 4 * 2 + comm.Get_rank() // 4)  # 0, 4, 1, 5, ...: nodes in turn
        hosts, near = by_host(mixed)
        choice = mpiattn.choose(mixed, **SIZES, dtype="float64", mask=Causal(), algorithms=["mesh"])
        candidate = Candidate("mesh", (("rows", 4), ("cols", 2)), (4, 1))
        assert choice.places == tuple(choice.plan.best.candidate.order(8)[hosts.index(rank)] for rank in range(8))
        best = dataclasses.replace(choice.plan.best, candidate=candidate)
        found = dataclasses.replace(choice.plan, outcomes=[best])
        order = candidate.order(8)
        chosen = Choice(found, tuple(order[hosts.index(rank)] for rank in range(8)))
        with chosen.attention(mixed) as attention:  # with the mask that was planned for
            node = comm.me.number // 4
            column = set(attention.comm.allgather((attention.comm.Get_rank() % 2, node)))
            x = np.random.default_rng(0).standard_normal((1, 2, 60, 8))
            own = np.ascontiguousarray(x[:, :, attention.positions(60)])
            whole = mpiattn.gather(attention.forward(own, own, own)[0], attention.comm, attention.layout)
        right = oracle.attention(x, x, x, Causal())[0]
        return hosts, [] if whole is None else [oracle.error(whole, right)], len(column) == 2 and near == 4

    results = virtual.run(8, dataclasses.replace(nodes, ranks_per_node=4), program)
    for hosts, errors, together in results:
        assert hosts == [0, 2, 4, 6, 1, 3, 5, 7] and together and all(error < 1e-10 for error in errors)
    assert any(errors for _, errors, _ in results)


def test_on_virtual_ranks() -> None:
    """The machine is the cluster's own."""
    for ranks in (1, 4, 6):
        results = virtual.run(ranks, machines.load("ethernet"), lambda comm: (attend_here(comm), here(False).name))
        assert {name for _, name in results} == {"ethernet"}
        assert len({chosen for (_, chosen), _ in results}) == 1
        assert max(results[0][0][0]) < 1e-10


def attend_here(comm: Any) -> tuple[list[float], str]:
    choice = mpiattn.choose(comm, **SIZES)
    assert (choice.plan.machine.name, choice.plan.machine.ranks_per_node) == ("ethernet", min(comm.Get_size(), 2))
    return attend(comm)


def test_without_a_description_gpus_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(several=False).name == "laptop" and here(several=True).name == "ethernet"
    monkeypatch.setitem(sys.modules, "cupy", sys)
    for name, preset in (("NVIDIA A100-SXM4-80GB", "a100-ib"), ("NVIDIA H200", "h200-ib")):
        monkeypatch.setattr(arrays, "gpus", lambda name=name: [name])
        assert here(several=False).name == preset
    monkeypatch.setattr(arrays, "gpus", list)
    assert here(several=False).name == "laptop"


def mpiattn_(n: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return mpiexec(n, sys.executable, "-m", "mpiattn", *arguments, timeout=90)


@pytest.mark.any_mpi
def test_run_and_compare(tmp_path: Path) -> None:
    small = ("--tokens", "37", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--seed", "3")
    output = tmp_path / "out.safetensors"
    done = mpiattn_(3, "run", "--algorithm", "auto", "--machine", "ethernet", *small, "--backward", "--output", output)
    assert done.returncode == 0, done.stderr
    assert re.match(r"auto: .* \(machine: ethernet\)\n  bytes: .*\n  time: .*\n  memory: .*\n", done.stdout)
    rng = np.random.default_rng(3)
    given = inputs.synthetic(rng, 37, 4, 2, 8, 1)
    right, _ = oracle.attention(given["q"], given["k"], given["v"], Causal())
    assert oracle.error(load_file(output)["out"], right) < 2e-5
    done = mpiattn_(4, "compare", "--algorithms", "auto,ring", "--layout", "zigzag", "--iterations", "1", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  ok\n") == 2 and done.stdout.count("auto: ") == 2
    done = mpiattn_(2, "run", "--algorithm", "auto", "--machine", "nowhere", *small, "--output", output)
    assert done.returncode == 2 and done.stderr.count("no machine 'nowhere'") == 1
