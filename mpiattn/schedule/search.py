"""The search for a schedule: orders of messages are tried, each is filled with blocks, and the best is kept.

A receive lets blocks start; a send of a partial sum makes blocks due. Where a send comes just before a
receive, exchanging the two starts no block later and makes none due earlier. So all receives come first.

What is left to choose is how Q and KV hops interleave, and dQ and dKV hops at the end. The greedy choice is
the hop that unlocks the most blocks per unit of time. The end of a backward pass is a beginning read from
its end, and takes the same choice. The greedy rule is tried with several tilts, and the best is kept.
"""

from __future__ import annotations

import functools
import itertools

from .fill import CLOSE, fill
from .steps import HopTimes, Op, Step, makespan

TILTS = tuple(2 ** (k / 2) for k in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6))
BUDGET = 8_000  # blocks placed in all trials together


@functools.lru_cache
def forward(rows: int, cols: int, costs: HopTimes) -> tuple[Step, ...]:
    """Order a forward tile: Q, KV and O hops."""
    return _best(rows, cols, costs, _orders(rows, cols, Op.Q, Op.KV, costs), [[Op.O] * (cols - 1)])


@functools.lru_cache
def backward(rows: int, cols: int, costs: HopTimes) -> tuple[Step, ...]:
    """Order a backward tile: Q, KV, dQ and dKV hops."""
    tails = [order[::-1] for order in _orders(rows, cols, Op.DQ, Op.DKV, costs)]
    return _best(rows, cols, costs, _orders(rows, cols, Op.Q, Op.KV, costs), tails)


def _best(rows: int, cols: int, costs: HopTimes, heads: list[list[Op]], tails: list[list[Op]]) -> tuple[Step, ...]:
    """Fill each head with each tail, the least tilted first; large tiles need, and get, fewer trials."""
    least = max(costs.communication(rows, cols), rows * cols * costs.block)
    pairs = sorted(itertools.product(range(len(heads)), range(len(tails))), key=sum)
    best: tuple[Step, ...] = ()
    for head, tail in pairs[: max(1, BUDGET // (rows * cols))]:
        steps = fill(rows, cols, heads[head] + tails[tail], costs)
        if not best or makespan(steps, costs) < makespan(best, costs) * (1 - CLOSE):
            best = steps
        if makespan(best, costs) <= least * (1 + CLOSE):
            break
    return best


def _orders(rows: int, cols: int, along_row: Op, along_col: Op, costs: HopTimes) -> list[list[Op]]:
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
