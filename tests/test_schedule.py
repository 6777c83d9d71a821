"""The mesh's schedule: valid on a whole grid of ranks, near the optimum, cheap to make. No MPI."""

import argparse
import heapq
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiattn.commands.schedule import command
from mpiattn.errors import InputError
from mpiattn.planner import Task
from mpiattn.schedule import search, tile
from mpiattn.schedule.steps import HopTimes, Op, Step, makespan, relative

Steps = tuple[Step, ...]
Rank = tuple[int, int]


def order(rows: int, cols: int, costs: HopTimes, backward: bool) -> Steps:
    return (search.backward if backward else search.forward)(rows, cols, costs)


def check(rows: int, cols: int, steps: Steps, backward: bool) -> None:
    """Check one rank's view: ring order, delivery before use, blocks before sends, every block once."""
    hops = Counter[Op]()
    done: set[Rank] = set()
    for step in steps:
        assert step.message or step.blocks
        if step.message in (Op.O, Op.DQ):
            assert {(i, step.hop) for i in range(rows)} <= done
        if step.message is Op.DKV:
            assert {(step.hop, j) for j in range(cols)} <= done
        for i, j in step.blocks:
            assert 0 <= i <= hops[Op.KV] and 0 <= j <= hops[Op.Q]  # delivered in an earlier step
            assert (i, j) not in done
            done.add((i, j))
        if step.message:
            hops[step.message] += 1
            assert step.hop == hops[step.message]
        else:
            assert step.hop == 0
    assert len(done) == rows * cols
    expected = {Op.Q: cols - 1, Op.KV: rows - 1}
    expected |= {Op.DQ: cols - 1, Op.DKV: rows - 1} if backward else {Op.O: cols - 1}
    assert hops == Counter(expected)


def simulate(rows: int, cols: int, steps: Steps) -> None:
    """Carry the steps out on all ranks: each chunk's sum at its owner has each contribution exactly once."""
    ranks = list(itertools.product(range(rows), range(cols)))
    # Slots of each rank; a chunk is named by its owner, a partial sum lists what was added to it.
    q: dict[Rank, dict[int, Rank]] = {rank: {0: rank} for rank in ranks}
    kv: dict[Rank, dict[int, Rank]] = {rank: {0: rank} for rank in ranks}
    sums: dict[str, dict[Rank, dict[int, list[tuple[Rank, Rank]]]]] = {
        kind: {rank: {} for rank in ranks} for kind in ("row", "column")
    }
    for step in steps:
        chunks: dict[Rank, Rank] = {}
        partials: dict[Rank, list[tuple[Rank, Rank]]] = {}
        along_row = step.message in (Op.Q, Op.O, Op.DQ)
        kind = "row" if along_row else "column"
        for r, c in ranks:  # everything is sent before anything is received or computed
            target = (r, (c + 1) % cols) if along_row else ((r + 1) % rows, c)
            if step.message is Op.Q:
                chunks[target] = q[r, c][step.hop - 1]
            elif step.message is Op.KV:
                chunks[target] = kv[r, c][step.hop - 1]
            elif step.message:
                partials[target] = sums[kind][r, c].pop(step.hop)
        for rank in ranks:
            for i, j in step.blocks:
                pair = (q[rank][j], kv[rank][i])
                sums["row"][rank].setdefault(j, []).append(pair)
                sums["column"][rank].setdefault(i, []).append(pair)
        for rank, chunk in chunks.items():
            (q if step.message is Op.Q else kv)[rank][step.hop] = chunk
        for rank, partial in partials.items():
            sums[kind][rank].setdefault((step.hop + 1) % (cols if along_row else rows), []).extend(partial)
    for rank in ranks:
        assert list(sums["row"][rank]) == [0]
        assert Counter(sums["row"][rank][0]) == Counter((rank, other) for other in ranks)
        if any(step.message in (Op.DQ, Op.DKV) for step in steps):
            assert list(sums["column"][rank]) == [0]
            assert Counter(sums["column"][rank][0]) == Counter((other, rank) for other in ranks)


numbers = st.one_of(st.just(0.0), st.floats(0.001, 1000), st.integers(1, 5).map(float))
all_costs = st.builds(HopTimes, q=numbers, kv=numbers, block=numbers, o=numbers, dq=numbers, dkv=numbers)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 7), st.integers(1, 7), all_costs, st.booleans())
def test_a_schedule_is_valid_on_every_rank(rows: int, cols: int, costs: HopTimes, backward: bool) -> None:
    steps = order(rows, cols, costs, backward)
    check(rows, cols, steps, backward)
    simulate(rows, cols, steps)
    search.forward.cache_clear()
    search.backward.cache_clear()
    assert order(rows, cols, costs, backward) == steps


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (16, 32)])
def test_edges(rows: int, cols: int, backward: bool) -> None:
    costs = relative(backward=backward).balanced(rows, cols)
    steps = order(rows, cols, costs, backward)
    check(rows, cols, steps, backward)
    if rows * cols < 20:
        simulate(rows, cols, steps)
    if rows == cols == 1:
        assert steps == (Step(None, 0, ((0, 0),)),)


def test_the_checks_find_broken_schedules() -> None:
    steps = order(3, 3, relative().balanced(3, 3), backward=False)
    last = next(n for n, step in enumerate(steps) if step.message is Op.O)
    lost = (*steps[:1], Step(steps[1].message, steps[1].hop, ()), *steps[2:])
    early = (*steps[: last - 1], steps[last], steps[last - 1], *steps[last + 1 :])
    for broken in (lost, early, steps[:-1]):
        with pytest.raises(AssertionError):
            check(3, 3, broken, backward=False)
    with pytest.raises(AssertionError):
        simulate(3, 3, lost)


# -- the optimum ----------------------------------------------------------------------------------------------


def sends_in_every_order(rows: int, cols: int, backward: bool) -> list[list[tuple[Op, int]]]:
    """List all ways to interleave the sends."""
    if not backward:
        return [[(Op.O, k) for k in range(1, cols)]]
    count = rows + cols - 2
    orders = []
    for places in itertools.combinations(range(count), cols - 1):
        dq, dkv = itertools.count(1), itertools.count(1)
        orders.append([(Op.DQ, next(dq)) if n in places else (Op.DKV, next(dkv)) for n in range(count)])
    return orders


def optimum(rows: int, cols: int, costs: HopTimes, backward: bool, limit: float) -> float:
    """Return the least makespan of any schedule, or `limit` if none is below it, by best-first search.

    A state is (Q hops, KV hops, sends, blocks done); all places of the receives among the sends are tried. Given
    the order of the sends, blocks of equal cost may be taken in the order in which they are due (exchange
    argument), a step computes all that fits into its message (blocks done are never a drawback), and at most
    one more, as a step without a message does the same for any further one.
    """
    best = limit * (1 - 1e-9)
    tiles = list(itertools.product(range(rows), range(cols)))
    for sends in sends_in_every_order(rows, cols, backward):
        place = {send: n for n, send in enumerate(sends)}
        never = len(sends)
        due = {(i, j): min(place.get(s, never) for s in ((Op.O, j), (Op.DQ, j), (Op.DKV, i))) for i, j in tiles}
        ranked = sorted(tiles, key=lambda block: (due[block], block))  # bit n: the n-th to be due
        before_send = [sum(1 << n for n, block in enumerate(ranked) if due[block] <= s) for s in range(never)]
        there = {
            (q, k): [n for n, (i, j) in enumerate(ranked) if i <= k and j <= q]
            for q in range(cols)
            for k in range(rows)
        }
        waiting = [sum(costs.of(op) for op, _ in sends[s:]) for s in range(never + 1)]

        def still(state: tuple[int, int, int, int], waiting: list[float] = waiting) -> float:
            q, k, s, done = state
            messages = (cols - 1 - q) * costs.q + (rows - 1 - k) * costs.kv + waiting[s]
            return max(messages, (rows * cols - done.bit_count()) * costs.block)

        start, goal = (0, 0, 0, 0), (cols - 1, rows - 1, never, (1 << rows * cols) - 1)
        reached, queue = {start: 0.0}, [(still(start), 0.0, start)]
        while queue:
            bound, now, state = heapq.heappop(queue)
            if bound >= best:
                break
            if state == goal:
                best = now
                break
            if now > reached[state]:
                continue
            q, k, s, done = state
            ready = [n for n in there[q, k] if not done >> n & 1]
            moves: list[tuple[float, int, int, int]] = []
            if q + 1 < cols:
                moves.append((costs.q, q + 1, k, s))
            if k + 1 < rows:
                moves.append((costs.kv, q, k + 1, s))
            if s < never and before_send[s] & ~done == 0:
                moves.append((costs.of(sends[s][0]), q, k, s + 1))
            steps = []
            for travel, *after in moves:
                fit = min(len(ready), int(travel / costs.block + 1e-9))
                steps += [(travel, after, fit), (travel, after, min(len(ready), fit + 1))]
            if ready:
                steps.append((0.0, [q, k, s], 1))
            for travel, (q2, k2, s2), count in steps:
                then = (q2, k2, s2, done | sum(1 << n for n in ready[:count]))
                at = now + max(travel, count * costs.block)
                if at < reached.get(then, best) and at + still(then) < best:
                    reached[then] = at
                    heapq.heappush(queue, (at + still(then), at, then))
    return limit if best == limit * (1 - 1e-9) else best


def brute_force(rows: int, cols: int, costs: HopTimes, backward: bool) -> float:
    """Return the least makespan with no argument at all: any message that may go, with any blocks that may start."""
    tiles = list(itertools.product(range(rows), range(cols)))
    ops = [Op.Q, Op.KV, Op.DQ, Op.DKV] if backward else [Op.Q, Op.KV, Op.O]
    most = {Op.Q: cols - 1, Op.KV: rows - 1, Op.O: cols - 1, Op.DQ: cols - 1, Op.DKV: rows - 1}
    start: tuple[tuple[int, ...], frozenset[Rank]] = ((0,) * len(ops), frozenset())
    reached, queue, tie = {start: 0.0}, [(0.0, 0, start)], itertools.count(1)
    while True:
        now, _, state = heapq.heappop(queue)
        hops, done = state
        if len(done) == len(tiles) and hops == tuple(most[op] for op in ops):
            return now
        if now > reached[state]:
            continue
        ready = [(i, j) for i, j in tiles if i <= hops[1] and j <= hops[0] and (i, j) not in done]
        choices: list[tuple[float, tuple[int, ...]]] = [(0.0, hops)]
        for n, op in enumerate(ops):
            hop = hops[n] + 1
            needs = {Op.O: [(i, hop) for i in range(rows)], Op.DKV: [(hop, j) for j in range(cols)]}
            needs[Op.DQ] = needs[Op.O]
            if hop <= most[op] and done.issuperset(needs.get(op, [])):
                choices.append((costs.of(op), (*hops[:n], hop, *hops[n + 1 :])))
        for travel, after in choices:
            for count in range(len(ready) + 1):
                at = now + max(travel, count * costs.block)
                for blocks in itertools.combinations(ready, count):
                    then = (after, done | frozenset(blocks))
                    if at < reached.get(then, float("inf")):
                        reached[then] = at
                        heapq.heappush(queue, (at, next(tie), then))


def hops_of(backward: bool, group: int, partial: int = 4) -> HopTimes:
    return relative(backward=backward, heads=group, itemsize=4, partial_itemsize=partial)


BRUTE = [(1, 3), (3, 1), (2, 2), (2, 3), (3, 2)]


@pytest.mark.parametrize(
    ("rows", "cols", "backward"),
    [(*tile, backward) for tile in BRUTE for backward in (False, True)] + [(2, 4, False), (4, 2, False)],
)
def test_the_search_agrees_with_brute_force(rows: int, cols: int, backward: bool) -> None:
    for group, ratio in itertools.product((1, 4), (0.5, 1.0, 1.7)):
        costs = hops_of(backward, group).balanced(rows, cols, ratio)
        least = brute_force(rows, cols, costs, backward)
        assert optimum(rows, cols, costs, backward, limit=2 * least) == pytest.approx(least)


SMALL = sorted(
    {tile for a, b in [(5, 3), (4, 5), (5, 4), (3, 5)] for tile in itertools.product(range(1, a + 1), range(1, b + 1))}
)


@pytest.mark.parametrize("partial", [4, 8])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_small_tiles_are_near_the_optimum(backward: bool, group: int, partial: int) -> None:
    for rows, cols in SMALL:
        for ratio in (1.0, 0.6, 1.5):
            costs = hops_of(backward, group, partial).balanced(rows, cols, ratio)
            found = makespan(order(rows, cols, costs, backward), costs)
            assert found <= 1.035 * optimum(rows, cols, costs, backward, limit=found), (rows, cols, ratio)


# -- larger tiles ---------------------------------------------------------------------------------------------

SIDES = (1, 2, 3, 4, 5, 6, 8, 16, 32)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("ratio", "target"), [(1.0, 1.2), (2.0, 1.03), (4.0, 1.03)])
@pytest.mark.parametrize("backward", [False, True])
def test_larger_tiles_hide_one_behind_the_other(backward: bool, ratio: float, target: float, group: int) -> None:
    """Within the target, or where no schedule is, at the optimum.

    Out of reach are, with communication and compute equal: one row or one column, whose few blocks can't cover
    the steps, each being longer than a hop; two columns with up to 8 rows, for the same reason. With twice as
    much communication: forward with one or two columns and up to 16 and 8 rows, as at least one block stands
    between the last chunk's arrival and the first send or the end; forward with three columns and 3 to 5 rows;
    backward up to 4 x 2.
    """
    for rows, cols in itertools.product(SIDES, SIDES):
        costs = hops_of(backward, group).balanced(rows, cols, ratio)
        least = max(costs.communication(rows, cols), rows * cols * costs.block)
        found = makespan(order(rows, cols, costs, backward), costs)
        if found > target * least:
            assert min(rows, cols) == 1 or (cols <= 3 and rows * cols <= 16), (rows, cols)
            assert found == pytest.approx(optimum(rows, cols, costs, backward, limit=found)), (rows, cols)


@pytest.mark.parametrize("backward", [False, True])
def test_instant(backward: bool) -> None:
    costs = relative(backward=backward).balanced(32, 32)
    search.forward.cache_clear()
    search.backward.cache_clear()
    start = time.process_time()
    order(32, 32, costs, backward)
    assert time.process_time() - start < 1.0


# -- costs, pictures, command line ----------------------------------------------------------------------------


def test_costs_follow_the_bytes() -> None:
    assert relative() == HopTimes(q=1, kv=2, o=1, block=1)
    assert relative(heads=8, kv_heads=2, itemsize=2) == HopTimes(q=1, kv=0.5, o=2, block=1)
    assert relative(backward=True, heads=4) == HopTimes(q=2, kv=0.5, dq=1, dkv=0.5, block=1)
    assert relative(head_dim=64).o == 1 + 2 / 64  # lse is float64
    assert relative(backward=True, head_dim=64).q == 2 + 3 / 64
    assert relative().balanced(4, 4).block * 16 == relative().communication(4, 4) == 12
    assert relative().balanced(1, 1).block == 1


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_costs(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        HopTimes(q=bad, kv=1, o=1, block=1)


def test_bad_tile() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        search.forward(0, 3, relative())


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(words))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "schedule.json"
    assert run("2x3", "--backward", "--costs", "2,2,1,2,1.5", "--json", str(report)) == 0
    assert "2 x 3, backward" in capsys.readouterr().out
    written = json.loads(report.read_text())
    steps = tuple(
        Step(step["message"] and Op(step["message"]), step["hop"], tuple((i, j) for i, j in step["blocks"]))
        for step in written["steps"]
    )
    costs = HopTimes(**written["costs"])
    assert costs == HopTimes(q=2, kv=2, dq=1, dkv=2, block=1.5)
    assert steps == search.backward(2, 3, costs)
    assert written["time"] == makespan(steps, costs)
    assert command.text(steps).splitlines()[2].split() == ["1", "Q", "1", "0,0"]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3)])
@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (4, 4), (1, 5), (3, 5)])
def test_the_command_prints_what_the_mesh_does(
    grid: tuple[int, int], heads: int, kv_heads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for head_dim, words in ((64, []), (8, ["--head-dim", "8"])):
        problem = Task(64, heads, kv_heads, head_dim, dtype="float32").problem(math.prod(grid))
        for steps, backward in zip(tile.steps(problem, *grid), ([], ["--backward"]), strict=True):
            assert run("x".join(map(str, grid)), "--kv-ratio", str(heads // kv_heads), *words, *backward) == 0
            assert capsys.readouterr().out.partition("\n\n")[2].strip() == command.text(steps)


def test_the_command_prints_the_steps_that_the_mesh_explains(capsys: pytest.CaptureFixture[str]) -> None:
    """In its docstring."""
    run("2x3")
    rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [["Q", "1"], ["KV", "1"], ["Q", "2"], ["O", "1"], ["O", "2"]]


@pytest.mark.parametrize("words", [["4x0"], ["4"], ["x"], ["4x4x4"], ["-1x2"], ["4*4"]])
def test_bad_grids_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert "ROWSxCOLS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--costs", "1,2"], "--costs takes 4 numbers"),
        (["--kv-ratio", "0"], "--kv-ratio is a whole number from 1, not 0"),
        (["--head-dim", "0"], "--head-dim is a whole number from 1, not 0"),
        (["--costs=-1,1,1,1"], "the cost of q is a finite number, 0 or more, not -1.0"),
        (["--costs", "a,1,1,1"], "takes numbers, q,kv,o,block, not 'a'"),
    ],
)
def test_bad_numbers(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("4x4", *words)


@pytest.mark.parametrize("grid", ["1x1", "4x5", "20x3"])
@pytest.mark.parametrize("flags", [[], ["--backward"]])
def test_picture(grid: str, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedule.png"
    assert run(grid, *flags, "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
