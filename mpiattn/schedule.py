"""The order of messages and blocks in one rank's Mesh-Attention tile (arXiv 2512.20968), without MPI.

In a rank's own coordinates Q slot j is the Q chunk that has travelled j hops along the grid row, and KV slot
i the K/V chunk that has travelled i hops along the grid column; slot 0 is its own. The tile is all blocks
(i, j). Every rank does the same step at the same time, so one list serves them all.

Three facts give the schedule:

- A receive lets blocks start; a send of a partial sum makes blocks due. Where a send comes just before a
  receive, exchanging the two starts no block later and makes none due earlier. So all receives come first.
- With the order of messages fixed, each block has a first and a last step. To fill the steps is then to match
  blocks with the time that messages cover, and taking the block that is due first solves that exactly. Own
  slots are never due, or due last: they fill the waits.
- What is left to choose is how Q and KV hops interleave, and dQ and dKV hops at the end. The greedy choice is
  the hop that unlocks the most blocks per unit of time. The end of a backward pass is a beginning read from
  its end, and takes the same choice. The greedy rule is tried with several tilts, and the best is kept.
"""

from __future__ import annotations

import argparse
import enum
import functools
import heapq
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import grid

TILTS = tuple(2 ** (k / 2) for k in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6))
BUDGET = 8_000  # blocks placed in all trials together
CLOSE = 1e-9  # times closer than this, relative, are equal


class Op(str, enum.Enum):
    """What travels in one hop; a backward Q brings dO, delta and LSE."""

    Q = "Q"
    KV = "KV"
    O = "O"
    DQ = "dQ"
    DKV = "dKV"


@dataclass(frozen=True)
class Step:
    """At most one message, and the blocks (KV slot, Q slot) computed while it travels.

    `hop` counts the messages of one kind from 1. A Q or KV hop receives that slot and forwards the one before;
    an O, dQ or dKV hop sends that slot's partial sum and receives the next slot's, after the last slot 0's.
    """

    message: Op | None
    hop: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Costs:
    """Time of one block and of one hop of each kind, in any one unit."""

    q: float
    kv: float
    block: float
    o: float = 0.0  # forward only
    dq: float = 0.0  # backward only
    dkv: float = 0.0  # backward only

    def __post_init__(self) -> None:
        if not all(math.isfinite(time) and time >= 0 for time in vars(self).values()):
            raise ValueError(f"a cost must be a finite number, zero or more: {self}")

    def of(self, op: Op | None) -> float:
        """Time of one hop."""
        return {None: 0.0, Op.Q: self.q, Op.KV: self.kv, Op.O: self.o, Op.DQ: self.dq, Op.DKV: self.dkv}[op]

    def communication(self, rows: int, cols: int) -> float:
        """Time of all hops of a tile."""
        return (cols - 1) * (self.q + self.o + self.dq) + (rows - 1) * (self.kv + self.dkv)

    def balanced(self, rows: int, cols: int, ratio: float = 1.0) -> Costs:
        """Return the same hops, with blocks such that all hops take `ratio` times as long as all blocks."""
        return replace(self, block=(self.communication(rows, cols) or 1.0) / (ratio * rows * cols))


def relative(
    *,
    backward: bool = False,
    heads: int = 1,
    kv_heads: int = 1,
    itemsize: int = 4,
    partial_itemsize: int = 4,
    head_dim: int | None = None,
    block: float = 1.0,
) -> Costs:
    """Hops by their bytes, in chunks of Q. With `head_dim`, rows of LSE and delta count too."""
    kv, partial = 2 * kv_heads / heads, partial_itemsize / itemsize
    row = partial / head_dim if head_dim else 0.0
    if backward:
        return Costs(q=2 + 2 * row, kv=kv, dq=partial, dkv=kv * partial, block=block)
    return Costs(q=1.0, kv=kv, o=partial + row, block=block)


@functools.lru_cache
def forward(rows: int, cols: int, costs: Costs) -> tuple[Step, ...]:
    """Order a forward tile: Q, KV and O hops."""
    return _best(rows, cols, costs, _orders(rows, cols, Op.Q, Op.KV, costs), [[Op.O] * (cols - 1)])


@functools.lru_cache
def backward(rows: int, cols: int, costs: Costs) -> tuple[Step, ...]:
    """Order a backward tile: Q, KV, dQ and dKV hops."""
    tails = [order[::-1] for order in _orders(rows, cols, Op.DQ, Op.DKV, costs)]
    return _best(rows, cols, costs, _orders(rows, cols, Op.Q, Op.KV, costs), tails)


def makespan(steps: Sequence[Step], costs: Costs) -> float:
    """Time of a schedule; a step ends when both its message and its blocks have."""
    return math.fsum(max(costs.of(step.message), len(step.blocks) * costs.block) for step in steps)


def _best(rows: int, cols: int, costs: Costs, heads: list[list[Op]], tails: list[list[Op]]) -> tuple[Step, ...]:
    """Fill each head with each tail, the least tilted first; large tiles need, and get, fewer trials."""
    least = max(costs.communication(rows, cols), rows * cols * costs.block)
    pairs = sorted(itertools.product(range(len(heads)), range(len(tails))), key=sum)
    best: tuple[Step, ...] = ()
    for head, tail in pairs[: max(1, BUDGET // (rows * cols))]:
        steps = _fill(rows, cols, heads[head] + tails[tail], costs)
        if not best or makespan(steps, costs) < makespan(best, costs) * (1 - CLOSE):
            best = steps
        if makespan(best, costs) <= least * (1 + CLOSE):
            break
    return best


def _orders(rows: int, cols: int, along_row: Op, along_col: Op, costs: Costs) -> list[list[Op]]:
    """Ways to interleave hops of row and column: most blocks unlocked per time, tilted either way."""
    if rows < 1 or cols < 1:
        raise ValueError(f"a grid has at least one row and one column, not {rows} x {cols}")
    orders: list[list[Op]] = []
    for tilt, ahead in itertools.product(TILTS, (0, 1)):  # ahead: the row goes first in any case
        order: list[Op] = []
        i = j = 1  # chunks held
        while i < rows or j < cols:
            # A hop along the row unlocks i blocks, one along the column unlocks j.
            row_next = i * costs.of(along_col) * tilt >= (j - ahead) * costs.of(along_row)
            if j < cols and (i == rows or row_next):
                order.append(along_row)
                j += 1
            else:
                order.append(along_col)
                i += 1
        if order not in orders:
            orders.append(order)
    return orders


def _fill(rows: int, cols: int, messages: list[Op], costs: Costs) -> tuple[Step, ...]:
    """Give each block a step, for one order of messages, with the least makespan that this order allows."""
    end = len(messages)
    hops = [messages[: t + 1].count(op) for t, op in enumerate(messages)]
    when = {(op, hop): t for t, (op, hop) in enumerate(zip(messages, hops, strict=True))}
    # unlocked[t]: blocks that may start at message t, as (message they are due before, Q slot, KV slot, t).
    unlocked: list[list[tuple[int, int, int, int]]] = [[] for _ in range(end + 1)]
    for i, j in itertools.product(range(rows), range(cols)):
        start = 1 + max(when.get((Op.KV, i), -1), when.get((Op.Q, j), -1))
        due = min(when.get(send, end) for send in ((Op.O, j), (Op.DQ, j), (Op.DKV, i)))
        unlocked[start].append((due, j, i, start))

    fits = {op: _whole(costs.of(op), costs.block, rows * cols) for op in dict.fromkeys(messages)}
    sticks_out = {op: (whole + 1) * costs.block - costs.of(op) for op, whole in fits.items()}
    room = [fits[op] for op in messages] + [0]

    def walk() -> tuple[list[list[tuple[int, int, int, int]]], ...]:
        """Put at most room[t] blocks in message t, those due first; return them and those late for it."""
        done, late, ready = [], [], list[tuple[int, int, int, int]]()
        for t in range(end + 1):
            for block in unlocked[t]:
                heapq.heappush(ready, block)
            missed = []
            while ready and ready[0][0] == t:
                missed.append(heapq.heappop(ready))
            late.append(missed)
            done.append([heapq.heappop(ready) for _ in range(min(room[t], len(ready)))])
        return done, late

    def widen(steps: list[int], before: int) -> int:
        """Let one more block into each step where that makes fewer late; return how many are late then."""
        for t in steps:
            room[t] += 1
        after = sum(map(len, walk()[1]))
        if before - after == len(steps):
            return after
        for t in steps:
            room[t] -= 1
        if before == after or len(steps) == 1:
            return before
        half = len(steps) // 2
        return widen(steps[half:], widen(steps[:half], before))

    # Beyond the blocks that fit whole: a late block costs its full time, so one that sticks out of a step is
    # cheaper where it saves a late one; those that stick out least come first.
    late_blocks = sum(map(len, walk()[1]))
    for op in sorted(fits, key=sticks_out.__getitem__):
        if sticks_out[op] < costs.block * (1 - CLOSE):
            late_blocks = widen([t for t in range(end) if messages[t] is op], late_blocks)

    steps: list[Step] = []
    done, late = walk()
    for t in range(end + 1):
        # A late block costs the same in the message before, if it could start then, as in a step of its own.
        if t:
            blocks = done[t - 1] + [block for block in late[t] if block[3] < t]
            steps.append(Step(messages[t - 1], hops[t - 1], tuple((i, j) for _, j, i, _ in blocks)))
        if alone := tuple((i, j) for _, j, i, start in late[t] if start == t):
            steps.append(Step(None, 0, alone))
    return tuple(steps)


def _whole(time: float, block: float, most: int) -> int:
    """How many of `most` blocks fit into a time."""
    return most if block * most <= time else min(most, math.floor(time / block * (1 + CLOSE)))


def text(steps: Sequence[Step]) -> str:
    """Table of steps: what arrives, what leaves, and the blocks computed meanwhile."""
    from tabulate import tabulate

    table = []
    for number, step in enumerate(steps, 1):
        message = f"{step.message.value} {step.hop}" if step.message else ""
        table.append((number, message, " ".join(f"{i},{j}" for i, j in step.blocks)))
    headers = ("step", "message, slot", "blocks (KV slot,Q slot)")
    return tabulate(table, headers=headers, maxcolwidths=[None, None, 72])


def draw(steps: Sequence[Step], costs: Costs, path: str | Path, title: str = "") -> None:
    """Picture: messages above blocks on one axis of time, and below the tile with the step of each block."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = {Op.Q: "#0072B2", Op.KV: "#E69F00", Op.O: "#009E73", Op.DQ: "#56B4E9", Op.DKV: "#CC79A7"}
    rows, cols = (1 + max(block[axis] for step in steps for block in step.blocks) for axis in (0, 1))
    height, small = 5 * min(1, max(rows / 8, 0.4)), len(steps) <= 40
    figure = Figure(figsize=(11, 4 + height), layout="constrained")
    timeline, tile = figure.subplots(2, 1, height_ratios=[3, 0.5 + height])
    total, now = makespan(steps, costs) or 1.0, 0.0
    for number, step in enumerate(steps, 1):
        shade, ink = colormaps["cividis"](now / total), "white" if now < 0.6 * total else "black"
        travel, width = costs.of(step.message), makespan([step], costs)
        if step.message:
            timeline.broken_barh([(now, travel)], (1, 0.8), color=colours[step.message], edgecolor="white")
            if travel > 0.03 * total:
                label = {"s": f"{step.message.value}\n{step.hop}", "ha": "center", "va": "center", "fontsize": 9}
                timeline.text(now + travel / 2, 1.4, **label, color="white" if step.message is Op.Q else "black")
        bars = [(now + k * costs.block, costs.block) for k in range(len(step.blocks))]
        timeline.broken_barh(bars, (0, 0.8), color=shade, edgecolor="white", linewidth=0.8 if small else 0.1)
        if small:
            timeline.text(now + width / 2, 1.95, str(number), ha="center", fontsize=8)
            timeline.axvline(now + width, color="0.8", linewidth=0.5, zorder=0)
        for i, j in step.blocks:
            tile.broken_barh([(j - 0.5, 1)], (i - 0.5, 1), color=shade, edgecolor="white")
            if max(rows, cols) <= 16:
                tile.text(j, i, str(number), ha="center", va="center", color=ink, fontsize=9)
        now += width
    for op in dict.fromkeys(step.message for step in steps if step.message):
        timeline.plot([], [], color=colours[op], linewidth=6, label=op.value)
    if any(step.message for step in steps):
        timeline.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="message")
    timeline.set(xlim=(0, total), ylim=(-0.1, 2.2), yticks=[0.4, 1.4], yticklabels=["blocks", "message"])
    timeline.set(xlabel="time" + ", and the step on top" * small, title=title)
    tile.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    tile.set(xticks=range(0, cols, 1 + cols // 17), yticks=range(0, rows, 1 + rows // 17))
    tile.set(xlabel="Q slot", ylabel="KV slot")
    tile.set_title("when each block is computed: dark first" + ", and its step" * (max(rows, cols) <= 16))
    for axes, side in itertools.product((timeline, tile), ("top", "right", "left")):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn schedule`."""
    parser.add_argument("grid", type=grid.argument, metavar="ROWSxCOLS", help="the grid of ranks, such as 4x4")
    parser.add_argument("--backward", action="store_true", help="the backward pass (default: forward)")
    parser.add_argument("--kv-ratio", type=int, default=1, metavar="G", help="query heads for each K/V head")
    parser.add_argument(
        "--costs",
        metavar="NUMBERS",
        help="times of one hop and of one block: q,kv,o,block, or backward q,kv,dq,dkv,block "
        "(default: hops by their bytes, and blocks that take as long as all hops)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the schedule (png, pdf, svg)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule")


def main(args: argparse.Namespace) -> int:
    """Print one schedule; draw or write it where asked."""
    rows, cols = args.grid
    names = ["q", "kv", "dq", "dkv", "block"] if args.backward else ["q", "kv", "o", "block"]
    try:
        if args.kv_ratio < 1:
            raise ValueError(f"--kv-ratio is a whole number from 1, not {args.kv_ratio}")
        if args.costs:
            numbers = [float(number) for number in args.costs.split(",")]
            if len(numbers) != len(names):
                raise ValueError(f"--costs takes {len(names)} numbers, {','.join(names)}, not {len(numbers)}")
            costs = Costs(**dict(zip(names, numbers, strict=True)))
        else:
            costs = relative(backward=args.backward, heads=args.kv_ratio).balanced(rows, cols)
    except ValueError as error:
        print(f"mpiattn schedule: error: {error}", file=sys.stderr)
        return 2
    steps = (backward if args.backward else forward)(rows, cols, costs)
    times = {
        "time": makespan(steps, costs),
        "communication": costs.communication(rows, cols),
        "compute": rows * cols * costs.block,
    }
    direction = "backward" if args.backward else "forward"
    title = f"Mesh-Attention, {rows} x {cols}, {direction}: " + ", ".join(
        f"{name} {value:.4g}" for name, value in times.items()
    )
    print(title, text(steps), sep="\n\n")
    if args.plot:
        draw(steps, costs, args.plot, title)
    if args.json:
        report = {"rows": rows, "cols": cols, "direction": direction, "costs": asdict(costs), **times}
        report["steps"] = [asdict(step) for step in steps]
        args.json.write_text(json.dumps(report) + "\n")
    return 0
