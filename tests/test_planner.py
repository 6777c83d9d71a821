"""The planner: what it chooses, what it says, what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpiattn import machines
from mpiattn.commands.plan import command
from mpiattn.costs import COSTS
from mpiattn.errors import InputError
from mpiattn.machines.machine import Link, Machine
from mpiattn.planner import Candidate, Task, candidates, plan, simulate, units
from mpiattn.planner.candidates import tile
from mpiattn.planner.estimate import estimate
from mpiattn.problems.mask import Causal, Documents, Full, SlidingWindow

H200 = machines.load("h200-ib")
SMALL = Task(16384, 16, 4, 64, mask=Causal())


def slow(gigabytes: float) -> Machine:
    """Return the machine with all links slowed down."""
    links = {level: Link(link.latency, gigabytes * 1e9, cards=link.cards) for level, link in H200.links.items()}
    return dataclasses.replace(H200, links=links)


def called(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(argv))


def test_the_plan_is_in_the_order_of_time() -> None:
    result = plan(SMALL, H200, 16)
    seconds = [outcome.seconds for outcome in result.outcomes]
    assert seconds == sorted(seconds)
    assert {"ring", "mesh"} <= {outcome.candidate.algorithm for outcome in result.outcomes}
    everyone = [*(outcome.candidate for outcome in result.outcomes), *(left for left, _ in result.left_out)]
    assert sorted(everyone, key=repr) == sorted(candidates(16, H200), key=repr)


def test_bytes_of_an_outcome_are_those_of_the_formula() -> None:
    for candidate in (Candidate("ring"), Candidate("mesh", (("rows", 4), ("cols", 4)), (4, 2))):
        outcome = simulate(SMALL, H200, 16, candidate)
        formula = [COSTS[candidate.algorithm](SMALL.problem(16), rank, **dict(candidate.arguments)) for rank in
                   range(16)]  # fmt: skip
        assert outcome.received == max(cost.forward.nbytes + cost.backward.nbytes for cost in formula)


def test_a_network_that_costs_nothing_leaves_the_work() -> None:
    free = dataclasses.replace(slow(1e9), memory_bandwidth=1e30, launch=0.0, overhead=0.0)
    free = dataclasses.replace(free, links={level: Link(0, 1e30) for level in free.links})
    outcome = simulate(dataclasses.replace(SMALL, mask=Full()), free, 16, Candidate("ring"))
    assert outcome.seconds == pytest.approx(outcome.computed)


def test_where_the_network_is_slow_the_fewest_bytes_win() -> None:
    result = plan(dataclasses.replace(SMALL, kv_heads=16), slow(0.05), 16, algorithms=["ring", "mesh"])
    assert result.best.candidate.algorithm == "mesh"
    ring = next(outcome for outcome in result.outcomes if outcome.candidate.algorithm == "ring")
    assert ring.seconds / result.best.seconds == pytest.approx(ring.received / result.best.received, rel=0.15)


def test_placement_on_nodes_is_a_permutation_and_matters() -> None:
    for candidate in candidates(16, H200, ["mesh"]):
        assert sorted(candidate.order(16)) == list(range(16))
    inside = Candidate("mesh", (("rows", 4), ("cols", 4)), (2, 4))
    # The ranks 0..7 of a node hold rows 0 and 1.
    assert inside.order(16)[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    across = dataclasses.replace(inside, inside=(4, 2))
    assert across.order(16)[:8] == [0, 1, 4, 5, 8, 9, 12, 13]


def test_too_little_memory_says_what_would_do() -> None:
    """And that does."""
    with pytest.raises(
        InputError, match=r"need at least .* a rank .*possible are about \d+ tokens, or \d+ ranks"
    ) as hit:
        plan(SMALL, H200, 4, memory=4e7)
    fits = re.search(r"about (\d+) tokens, or (\d+) ranks", str(hit.value))
    assert fits is not None
    tokens, ranks = map(int, fits.groups())
    assert plan(dataclasses.replace(SMALL, tokens=tokens), H200, 4, memory=4e7).best.peak <= 4e7
    assert plan(SMALL, H200, ranks, memory=4e7, quick=True).best.peak <= 4e7


def test_memory_decides() -> None:
    """A limit below what the fastest holds leaves it out, and says so."""
    free = plan(SMALL, H200, 8)
    smallest = min(outcome.peak for outcome in free.outcomes)
    assert smallest < free.best.peak
    tight = plan(SMALL, H200, 8, memory=free.best.peak - 1)
    assert all(outcome.peak < free.best.peak for outcome in tight.outcomes)
    assert any(candidate == free.best.candidate and "needs" in why for candidate, why in tight.left_out)


@pytest.mark.parametrize(("name", "kv_heads"), [("ethernet", 16), ("h200-ib", 4), ("a100-ib", 16)])
def test_estimates_find_the_fastest(name: str, kv_heads: int) -> None:
    """The few candidates of a quick plan have one within 5 % of the best of all."""
    task = dataclasses.replace(SMALL, kv_heads=kv_heads, dtype="bfloat16")
    described = machines.load(name)
    quick = plan(task, described, 16, quick=True)
    assert len(quick.outcomes) <= 7
    best = min(simulate(task, described, 16, one).seconds for one in candidates(16, described))
    assert quick.best.seconds <= 1.05 * best


@pytest.mark.parametrize(
    ("name", "ranks", "task"),
    [
        ("laptop", 4, Task(4096, 32, 8, 128, mask=SlidingWindow(256), backward=False)),
        ("laptop", 16, Task(32768, 32, 8, 128, mask=SlidingWindow(2048), backward=False)),
        ("ethernet", 16, Task(262144, 32, 8, 128, mask=SlidingWindow(16384), backward=False)),
        ("h200-ib", 8, Task(4096, 32, 32, 128, mask=SlidingWindow(256))),
        ("h200-ib", 16, Task(4096, 32, 8, 128, mask=SlidingWindow(256), backward=False)),
        ("h200-nvlink", 6, Task(4096, 32, 8, 128, mask=Causal(), backward=False)),
    ],
    ids=lambda value: f"{value.mask}" if isinstance(value, Task) else str(value),
)
def test_estimates_with_windows_few_tokens_and_part_of_a_node(name: str, ranks: int, task: Task) -> None:
    """As above."""
    described = machines.load(name)
    quick = plan(task, described, ranks, quick=True)
    for one in candidates(ranks, described):
        with contextlib.suppress(TimeoutError):
            assert quick.best.seconds <= 1.05 * simulate(task, described, ranks, one, quick.best.seconds).seconds


def test_an_estimate_counts_a_nodes_ranks_once() -> None:
    """Groups larger than a node have no more ranks in it that send to another than it holds."""
    laptop = machines.load("laptop")
    task = Task(32768, 32, 8, 128, mask=SlidingWindow(2048))
    candidate = Candidate("hybrid", (("ulysses", 32), ("rows", 2), ("cols", 1)))
    assert estimate(task, laptop, 64, candidate).seconds == pytest.approx(
        simulate(task, laptop, 64, candidate).seconds, rel=0.2
    )


def test_a_tile_has_no_more_than_the_sequence() -> None:
    assert tile(Task(10, 4, 4, 8), 7, Candidate("ring")) == (2, 10)
    assert tile(Task(10, 4, 4, 8, kv_tokens=3), 7, Candidate("mesh", (("rows", 1), ("cols", 7)))) == (10, 1)


def test_uneven_lengths() -> None:
    task = Task(1001, 12, 12, 64, mask=Causal(), dtype="float32")
    names = {outcome.candidate.algorithm for outcome in plan(task, machines.load("laptop"), 6).outcomes}
    assert {"hybrid", "ulysses", "mesh", "ring"} <= names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 5}, r"16 heads can't share 5 K/V heads: choose one of \[1, 2, 4, 8, 16\]"),
        ({"tokens": 0}, "tokens must be a whole number, 1 or more, got 0"),
        ({"heads": -1}, "heads must be a whole number, 1 or more, got -1"),
        ({"heads": 2.5}, "heads must be a whole number"),
        ({"v_head_dim": 0}, "v_head_dim must be a whole number, 1 or more, got 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from float64"),
        ({"layout": "spiral"}, "unknown layout 'spiral': choose from contiguous"),
        ({"partials": "small"}, "unknown partials 'small': choose from wide, narrow"),
        ({"mask": Documents([3])}, "the documents hold 3 tokens, the sequence has 16384"),
    ],
)
def test_tasks_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change)


def test_other_bad_input() -> None:
    with pytest.raises(InputError, match="ranks must be a whole number, 1 or more"):
        plan(SMALL, H200, 0)
    with pytest.raises(InputError, match="memory must be more than 0"):
        plan(SMALL, H200, 4, memory=0)
    with pytest.raises(InputError, match=r"unknown algorithm mash: choose from .*mesh"):
        plan(SMALL, H200, 4, algorithms=["mash"])
    with pytest.raises(InputError, match="nothing to plan for decode: is for a few new tokens"):
        plan(SMALL, H200, 4, algorithms=["decode"])
    with pytest.raises(InputError, match="has no rates for float64, only for bfloat16"):
        plan(dataclasses.replace(SMALL, dtype="float64"), machines.load("a100-ib"), 4)


def test_numbers_on_the_command_line() -> None:
    assert [units.count(text) for text in ("4096", "128K", "1M")] == [4096, 2**17, 2**20]
    assert [units.size(text) for text in ("80GB", "512MB", "1.5G", "7")] == [80e9, 512e6, 1.5e9, 7]
    assert [units.size(text) for text in ("80GiB", "1 kiB", "2Mi")] == [80 * 2**30, 2**10, 2**21]
    for wrong in ("0", "-4", "x", "1T"):
        with pytest.raises(argparse.ArgumentTypeError):
            units.count(wrong)
    for wrong in ("0GB", "GB", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            units.size(wrong)


def test_the_command_prints_the_plan_and_three_lines_why(capsys: Any, tmp_path: Path) -> None:
    file, curve = tmp_path / "plan.json", tmp_path / "curve.svg"
    argv = ["--tokens", "16K", "--heads", "16", "--kv-heads", "4", "--head-dim", "64", "--ranks", "8", "--machine"]
    assert called(*argv, "h200-ib", "--backward", "--json", str(file), "--curve", str(curve)) == 0
    text = capsys.readouterr().out
    lines = text.rstrip().splitlines()
    assert [line.split(":")[0].strip() for line in lines[-3:]] == ["bytes", "time", "memory"]
    assert json.loads(file.read_text())["outcomes"][0]["candidate"]["algorithm"] in text
    assert curve.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-heads", "0"), "kv_heads must be a whole number, 1 or more, got 0"),
        (("--kv-heads", "5"), "16 heads can't share 5 K/V heads: choose one of"),
        (("--ranks", "-2"), "ranks must be a whole number, 1 or more, got -2"),
        (("--ranks", "10000000"), "a plan for 10000000 ranks takes 8e+14 bytes"),
        (("--memory", "20MB"), "possible are about"),
        (("--memory", "1KB"), "not even one token fits into 1 kB a rank"),
        (("--machine", "nowhere"), "no machine 'nowhere': give the path of a TOML file, or one of a100-ib"),
        (("--curve", "curve.bmp"), "must end in .png, .svg or .pdf"),
        (("--curve", "nowhere/curve.png"), "nowhere: no such folder"),
        (("--json", "nowhere/plan.json"), "nowhere: no such folder"),
        (("--json", "."), ".: is a folder, not a file"),
        (("--v-head-dim", "0"), "v_head_dim must be a whole number, 1 or more, got 0"),
        (("--algorithms", "rung"), "unknown algorithm rung: choose from ring, double_ring, mesh"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
    ],
)
def test_bad_input_of_the_command(arguments: tuple[str, ...], message: str) -> None:
    argv = ["--tokens", "4K", "--heads", "16", "--head-dim", "64", "--ranks", "4", *arguments]
    with pytest.raises(InputError, match=re.escape(message)):
        called(*argv)
