"""The blocks of each step, for one order of messages.

With the order fixed, each block has a first and a last step. To fill the steps is then to match blocks with the
time that messages cover, and taking the block that is due first solves that exactly. Own slots are never due,
or due last: they fill the waits.
"""

from __future__ import annotations

import heapq
import itertools
import math

from .steps import HopTimes, Op, Step

CLOSE = 1e-9  # times closer than this, relative, are equal


def fill(rows: int, cols: int, messages: list[Op], costs: HopTimes) -> tuple[Step, ...]:
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
    """Return how many of `most` blocks fit into a time."""
    return most if block * most <= time else min(most, math.floor(time / block * (1 + CLOSE)))
