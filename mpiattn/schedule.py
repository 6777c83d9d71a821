"""The order of messages and blocks for one rank's Mesh-Attention tile; pure integers, no MPI.

In a rank's own coordinates Q slot j is the Q chunk that has travelled j hops along the grid row and KV slot i
the K/V chunk that has travelled i hops along the grid column; slot 0 is its own. The tile is all blocks (i, j).
Every rank does the same step at the same time, so one list serves them all.

Three facts shape the schedule:

- A receive lets blocks start and a send (of a partial sum) makes blocks due. If a send comes just before a
  receive, exchanging the two starts no block later and makes none due earlier: so all receives come first.
- Once the order of messages is fixed, each block has a first and a last step. Filling the steps is then a
  matching of blocks with time that messages cover, and "the block that is due first" solves it exactly.
- What is left to choose is how Q and KV hops interleave, and dQ and dKV hops at the end. The greedy choice takes
  the hop that unlocks the most blocks per unit of time. The end of a backward pass is a beginning read from
  the end: there it is the hop that holds back the most. A few tilts of the greedy rule are tried, the best is kept.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Block = tuple[int, int]  # (KV slot, Q slot)


class Op(str, enum.Enum):
    """What travels in one hop."""

    Q = "Q"  # in the backward pass with dO, delta and LSE
    KV = "KV"
    O = "O"
    DQ = "dQ"
    DKV = "dKV"


@dataclass(frozen=True)
class Step:
    """One message at most, and the blocks computed while it travels.

    ``hop`` counts the messages of that kind from 1: the slot that a Q or KV hop receives, the slot whose partial
    sum an O, dQ or dKV hop sends (and what arrives belongs to the next slot, after the last to slot 0).
    """

    message: Op | None
    hop: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Costs:
    """Time of one hop of each kind and of one block, in any one unit."""

    q: float
    kv: float
    block: float
    o: float = 0.0  # forward only
    dq: float = 0.0  # backward only
    dkv: float = 0.0  # backward only

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x >= 0 for x in vars(self).values()):
            raise ValueError(f"costs must be finite and not negative: {self}")

    def of(self, op: Op) -> float:
        """Time of one hop."""
        return {Op.Q: self.q, Op.KV: self.kv, Op.O: self.o, Op.DQ: self.dq, Op.DKV: self.dkv}[op]

    def communication(self, rows: int, cols: int) -> float:
        """Time of all hops of a tile."""
        return (cols - 1) * (self.q + self.o + self.dq) + (rows - 1) * (self.kv + self.dkv)

    def balanced(self, rows: int, cols: int, ratio: float = 1.0) -> Costs:
        """The same hops with blocks such that all communication takes ``ratio`` times as long as all blocks."""
        return replace(self, block=self.communication(rows, cols) / (ratio * rows * cols))


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
    """Hops by their bytes; one chunk of Q is 1. With ``head_dim`` the rows of LSE and delta count too."""
    kv = 2 * kv_heads / heads
    partial = partial_itemsize / itemsize
    row = partial / head_dim if head_dim else 0.0
    if backward:
        return Costs(q=2 + 2 * row, kv=kv, dq=partial, dkv=kv * partial, block=block)
    return Costs(q=1.0, kv=kv, o=partial + row, block=block)


def forward(rows: int, cols: int, costs: Costs) -> tuple[Step, ...]:
    """Order one forward tile."""
    sends = [Op.O] * (cols - 1)
    return min(
        (_fill(rows, cols, [*order, *sends], costs) for order in _orders(rows, cols, Op.Q, Op.KV, costs)),
        key=lambda steps: makespan(steps, costs),
    )


def backward(rows: int, cols: int, costs: Costs) -> tuple[Step, ...]:
    """Order one backward tile."""
    receives = _orders(rows, cols, Op.Q, Op.KV, costs)
    sends = [order[::-1] for order in _orders(rows, cols, Op.DQ, Op.DKV, costs)]
    return min(
        (_fill(rows, cols, [*head, *tail], costs) for head in receives for tail in sends),
        key=lambda steps: makespan(steps, costs),
    )


def makespan(steps: Sequence[Step], costs: Costs) -> float:
    """Time of a schedule: a step ends when its message and its blocks have."""
    return sum(
        max(costs.of(step.message) if step.message else 0.0, len(step.blocks) * costs.block) for step in steps
    )


TILTS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0)


def _orders(rows: int, cols: int, along_row: Op, along_col: Op, costs: Costs) -> list[list[Op]]:
    """Ways to interleave the hops along row and column: blocks unlocked per time, tilted either way."""
    orders: list[list[Op]] = []
    for tilt in TILTS:
        order: list[Op] = []
        i = j = 1  # chunks here
        while i < rows or j < cols:
            # A hop along the row unlocks i blocks, one along the column j.
            row_next = i * costs.of(along_col) * tilt >= j * costs.of(along_row)
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
    """Give each block a step, for a fixed order of messages; the makespan is the least possible for it."""
    hops = [messages[: t + 1].count(op) for t, op in enumerate(messages)]
    at = {(op, hop): t for t, (op, hop) in enumerate(zip(messages, hops, strict=True))}
    end = len(messages)
    # unlocked[t]: blocks that may start once t messages are done, with the message that they are due before.
    unlocked: list[list[tuple[int, int, int]]] = [[] for _ in range(end + 1)]
    start: dict[Block, int] = {}
    for i in range(rows):
        for j in range(cols):
            start[i, j] = 1 + max(at.get((Op.KV, i), -1), at.get((Op.Q, j), -1))
            due = min(at.get((op, hop), end) for op, hop in ((Op.O, j), (Op.DQ, j), (Op.DKV, i)))
            unlocked[start[i, j]].append((due, j, i))

    def walk(room: list[int]) -> tuple[list[list[Block]], list[list[Block]]]:
        """At most room[t] blocks during message t, those due first; and the late ones, left over before it."""
        done: list[list[Block]] = []
        late: list[list[Block]] = []
        ready: list[tuple[int, int, int]] = []
        for t in range(end + 1):
            for block in unlocked[t]:
                heapq.heappush(ready, block)
            late.append([])
            while ready and ready[0][0] == t:
                late[t].append(heapq.heappop(ready)[:0:-1])  # type: ignore[arg-type]
            if t < end:
                done.append([heapq.heappop(ready)[:0:-1] for _ in range(min(room[t], len(ready)))])  # type: ignore[misc]
        return done, late

    def widen(steps: list[int], before: int) -> int:
        """One more block in as many of these steps as have a use for it; late blocks then."""
        for t in steps:
            room[t] += 1
        after = sum(map(len, walk(room)[1]))
        if before - after == len(steps):
            return after
        for t in steps:
            room[t] -= 1
        if before == after or len(steps) == 1:
            return before
        half = len(steps) // 2
        return widen(steps[half:], widen(steps[:half], before))

    # First the blocks that fit whole; then those that stick out, the least first, where that saves a late one.
    fits = {op: _fits(costs.of(op), costs.block, rows * cols) for op in set(messages)}
    room = [fits[op] for op in messages]
    sticks_out = {op: (fits[op] + 1) * costs.block - costs.of(op) for op in fits}
    late_blocks = sum(map(len, walk(room)[1]))
    for op in sorted(fits, key=lambda op: (sticks_out[op], op.value)):
        if sticks_out[op] < costs.block * (1 - 1e-9):
            late_blocks = widen([t for t in range(end) if messages[t] is op], late_blocks)

    steps: list[Step] = []
    done, late = walk(room)
    for t in range(end + 1):
        # A late block costs the same in the step before, if it could start there, or in a step without message.
        alone = [block for block in late[t] if start[block] >= t]
        if t:
            more = [block for block in late[t] if start[block] < t]
            steps.append(Step(messages[t - 1], hops[t - 1], tuple(done[t - 1] + more)))
        if alone:
            steps.append(Step(None, 0, tuple(alone)))
    return tuple(steps)


def _fits(time: float, block: float, most: int) -> int:
    """Whole blocks that fit into a time."""
    return most if block * most <= time else math.floor(time / block + 1e-9)
