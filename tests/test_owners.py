"""Whose chunks and sums are in the blocks and messages of a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiattn import machines, virtual
from mpiattn.algorithms import ALGORITHMS
from mpiattn.commands.trace.report import flows
from mpiattn.problems.mask import Causal, Full, Mask, SlidingWindow
from mpiattn.trace import owners
from mpiattn.trace.comm import TracedComm
from mpiattn.trace.events import Trace

TOKENS = 48


def traces(
    name: str, ranks: int, mask: Mask, layout: str, backward: bool, **arguments: Any
) -> tuple[list[Trace], dict[int, int]]:
    """Return the traces of a pass on virtual ranks, with their blocks named, and the owners of the messages."""

    def program(comm: Any) -> Trace:
        traced = TracedComm(comm)
        with ALGORITHMS[name](traced, mask=mask, layout=layout, **arguments) as attention:
            x = np.random.default_rng(0).standard_normal((1, 2, len(attention.positions(TOKENS)), 4))
            out, saved = attention.forward(x, x, x)
            if backward:
                traced.trace.clear()
                attention.backward(out, saved)
            owners.name_blocks(traced.trace, saved.problem)
        return traced.trace

    found = virtual.run(ranks, machines.load("laptop"), program)
    return found, owners.of_messages(found, flows(found))


def carried(found: list[Trace], named: dict[int, int], tag: str) -> dict[int, list[int | None]]:
    """Return the owners of what each rank received with a tag, in the order of the posted receives."""
    result: dict[int, list[tuple[float, int | None]]] = {rank: [] for rank in range(len(found))}
    for _, sent, dest, arrived in flows(found):
        if sent.name == tag:
            result[dest].append((arrived.start, named.get(id(sent))))
    return {rank: [owner for _, owner in sorted(some)] for rank, some in result.items()}


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_ring(ranks: int, layout: str) -> None:
    """K/V of the rank before come first; the last sum to come is one's own."""
    found, named = traces("ring", ranks, Full(), layout, backward=False)
    before = {rank: [(rank - hop) % ranks for hop in range(1, ranks)] for rank in range(ranks)}
    assert carried(found, named, "KV") == before
    assert [event.owners for event in found[1].events if event.kind == "compute"] == [
        (1, owner) for owner in [1, *before[1]]
    ]
    found, named = traces("ring", ranks, Full(), layout, backward=True)
    assert carried(found, named, "KV") == before
    assert carried(found, named, "D_KV") == {rank: [*before[rank][1:], rank] for rank in range(ranks)}


def test_the_mesh() -> None:
    """Rank (r, c) of 2 x 2: Q of its row, K/V of its column."""
    found, named = traces("mesh", 4, Causal(), "zigzag", backward=False, rows=2, cols=2)
    assert carried(found, named, "Q") == {0: [1], 1: [0], 2: [3], 3: [2]}
    assert carried(found, named, "KV") == {0: [2], 1: [3], 2: [0], 3: [1]}
    assert carried(found, named, "O") == {rank: [rank] for rank in range(4)}
    found, named = traces("mesh", 4, Causal(), "zigzag", backward=True, rows=2, cols=2)
    for tag in ("D_Q", "D_KV"):
        assert carried(found, named, tag) == {rank: [rank] for rank in range(4)}


def test_chunks_that_stop_at_their_last_user() -> None:
    found, named = traces("ring", 4, Causal(), "contiguous", backward=False)
    assert carried(found, named, "KV") == {0: [], 1: [0], 2: [1, 0], 3: [2, 1, 0]}
    found, named = traces("ring", 4, SlidingWindow(TOKENS // 4 - 1, 0), "contiguous", backward=False)
    assert carried(found, named, "KV") == {0: [], 1: [0], 2: [1], 3: [2]}


@pytest.mark.parametrize("name", ["dense", "mesh_gathered", "ulysses", "hybrid", "allgather"])
def test_what_is_not_known_is_not_named(name: str) -> None:
    """Blocks of several ranks' tokens, messages of other kinds."""
    for backward in (False, True):
        found, named = traces(name, 4, Full(), "contiguous", backward)
        for _, sent, _, _ in flows(found):
            assert id(sent) not in named or sent.name in (*owners.PASSED_ON, *owners.COMING_HOME)
        if name != "allgather":
            assert named == {}


def test_blocks_that_do_not_agree_leave_messages_without_names() -> None:
    found, named = traces("ring", 3, Full(), "zigzag", backward=False)
    assert named
    [first, *_] = [event for event in found[0].events if event.kind == "compute"]
    first.owners = (0, 99)
    assert owners.of_messages(found, flows(found)) == {}
