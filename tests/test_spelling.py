"""Algorithms with their arguments as text: one spelling for every command, and for what they print."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpiattn.algorithms import ALGORITHMS
from mpiattn.algorithms.spelling import parse, spell
from mpiattn.commands import chosen
from mpiattn.errors import InputError
from mpiattn.planner import units


def mpiattn(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in one process."""
    command = [sys.executable, "-m", "mpiattn", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


def test_every_variant_is_read_as_it_is_spelled() -> None:
    for ranks in (1, 4, 6, 12):
        for name, algorithm in ALGORITHMS.items():
            for arguments in algorithm.variants(ranks):
                assert parse(spell(name, arguments)) == (name, arguments)


def test_both_ways_to_write_a_grid() -> None:
    assert parse("mesh:2x3") == parse("mesh rows=2 cols=3") == ("mesh", {"rows": 2, "cols": 3})
    assert spell("mesh", {"rows": 2, "cols": 3}) == "mesh:2x3"
    assert parse("hybrid:2x1 ulysses=2") == ("hybrid", {"rows": 2, "cols": 1, "ulysses": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spiral", "unknown algorithm spiral: choose from dense, ring"),
        ("", "unknown algorithm : choose from"),
        ("auto", "unknown algorithm auto"),
        ("ring:1x2", "ring has no grid"),
        ("mesh:two", "mesh:two: a grid is ROWSxCOLS"),
        ("mesh:2x2 rows=2", "mesh takes rows=..., cols=..., each once"),
        ("ring head_groups=2", "ring takes no arguments"),
        ("allgather head_groups=two", "head_groups is a whole number"),
        ("allgather head_groups", "head_groups is a whole number"),
    ],
)
def test_a_wrong_text_says_what_is_right(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse(text)


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chosen.add_algorithms(parser, "all", auto=True)
    chosen.add_grid(parser, "every grid")
    parser.set_defaults(command="compare", virtual=None)
    return parser.parse_args(words)


def test_a_grid_chooses_variants() -> None:
    found, left_out = chosen.expand(asked("--grid", "2x2"), 4)
    assert ("mesh", {"rows": 2, "cols": 2}) in found and ("ring", {}) in found
    assert [arguments for name, arguments in found if name == "mesh"] == [{"rows": 2, "cols": 2}]
    assert [text.partition(":")[0] for text in left_out] == ["hybrid"]
    assert chosen.expand(asked("--algorithms", "mesh:1x4,allgather head_groups=4,auto"), 4)[0] == [
        ("mesh", {"rows": 1, "cols": 4}), ("allgather", {"head_groups": 4}), ("auto", {})
    ]  # fmt: skip
    assert len(chosen.expand(asked("--algorithms", "mesh,hybrid ulysses=2"), 4)[0]) == 3 + 2


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (("--algorithms", "mesh,hybrid,allgather", "--grid", "2x2"), 4, "no hybrid:2x2 on 4 ranks: choose from hybrid"),
        (("--algorithms", "ring,auto", "--grid", "2x2"), 4, "--grid does not go with ring, auto"),
        (("--algorithms", "mesh:1x4", "--grid", "2x2"), 4, "mesh:1x4 and --grid 2x2 exclude each other"),
        (("--algorithms", "mesh:1x9"), 4, "no mesh:1x9 on 4 ranks: choose from mesh:1x4, mesh:2x2, mesh:4x1"),
        (("--grid", "3x3"), 4, "no mesh:3x3 on 4 ranks"),
        (("--grid", "2x2"), 1, "there is one: mpiexec -n 4 mpiattn compare ..., or on virtual ones: --virtual 4"),
        (("--algorithms", "mesh:2x2"), 1, "mesh:2x2 takes 4 ranks, and there is one: mpiexec -n 4 mpiattn compare"),
    ],
)
def test_what_a_grid_does_not_fit_is_refused(words: tuple[str, ...], ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        chosen.expand(asked(*words), ranks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare --machine nonsense --tokens 8", "--machine nonsense does nothing here: it goes with --virtual or"),
        ("conformance --machine laptop", "--machine laptop does nothing here: it goes with --virtual\n"),
        ("run --machine laptop --output o.npz", "--machine laptop does nothing here: it goes with the algorithm auto"),
        ("run --algorithm ring --grid 1x1 --output o.npz", "--grid does not go with ring"),
        ("documents lab --tokens 1024", "--tokens does nothing for lab"),
        ("documents samples --machine laptop", "--machine does nothing for samples"),
        ("documents weak --iterations 3", "--iterations does nothing for weak"),
        ("schedule 2x2 --costs 1,1,1,1 --kv-ratio 4", "--kv-ratio and --costs exclude each other"),
        ("schedule 2x2 --costs 1,1,1,1 --head-dim 8", "--head-dim and --costs exclude each other"),
        ("compare --gpu-messages host --tokens 8", "--gpu-messages host goes with --arrays cupy"),
        ("conformance --full --case mask=causal", "--full and --case exclude each other"),
        ("conformance --share 1/2 --case mask=causal", "--share and --case exclude each other"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words: str, message: str) -> None:
    done = mpiattn(*words.split())
    assert done.returncode == 2 and message in done.stderr, (done.stdout, done.stderr)


def test_what_plan_prints_can_be_run(tmp_path: Path) -> None:
    small = ("--heads", "4", "--kv-heads", "4", "--head-dim", "8")
    done = mpiattn("plan", "--tokens", "1K", "--ranks", "4", *small, "--algorithms", "mesh:2x2,allgather,hybrid")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.split("\n\n")[0].splitlines()[3:] if not line.startswith("No room")]
    names = [re.split(r"  +", line)[0] for line in rows]
    assert {"mesh:2x2", "allgather head_groups=2", "hybrid:2x1 ulysses=2"} <= set(names)
    sizes = ("--tokens", "1K", *small, "--iterations", "1", "--layout", "contiguous")
    done = mpiattn("compare", "--virtual", "4", "--algorithms", ",".join(dict.fromkeys(names)), *sizes)
    assert done.returncode == 0 and done.stdout.count("  ok\n") == len(set(names)), (done.stdout, done.stderr)


def test_tokens_as_people_write_them() -> None:
    assert units.count("2K") == 2048 and units.counts("512,2k,1M") == [512, 2048, 2**20]
    assert units.count("0", least=0) == 0
    for text in ("0", "2G", "-1", "", "2.5K"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens"):
            units.count(text)
