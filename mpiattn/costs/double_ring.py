"""K/V on a ring of rings."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from ..problems.travel import windows
from .memory import Pass, around, largest, running, sums, total, turns
from .traffic import Costs, Traffic, messages, passing, sent, spread


def costs(problem: Problem, rank: int, outer: int, order: Sequence[int] | None = None) -> Costs:
    """K/V round the row in each window, and from row to row; backward dK/dV behind them in the row, then home.

    `order` has the ranks by their place in the grid, where they aren't in order there.
    """
    rows, r, c = _grid(problem, rank, outer, order)
    col = [row[c] for row in rows]
    in_col, in_row = windows(problem.needed, rows)
    kv = spread([in_col[owner] for owner in col], r, col, problem.kv)
    d_kv = Traffic()
    for window in range(outer):
        owners = rows[(r - window) % outer]
        ways = [in_row[window][owner] for owner in owners]
        kv += spread(ways, c, owners, problem.kv)
        d_kv += passing(ways, c, owners, sent(problem, problem.d_kv))
        if in_row[window][rank].first <= in_row[window][rank].last:
            d_kv += messages([problem.sent(problem.d_kv(rank))])
    return Costs(kv, kv + d_kv)


def memory(problem: Problem, rank: int, outer: int, order: Sequence[int] | None = None) -> tuple[Pass, Pass]:
    """Two buffers for the row and two for what comes from another, of K/V and of dK/dV; three for what arrives."""
    rows, r, c = _grid(problem, rank, outer, order)
    steps = [around(rows[r - window], c) for window in range(outer)]
    first, others = [window[0] for window in steps], [owner for window in steps for owner in window[1:]]
    last, before = [window[-1] for window in steps], [owner for window in steps for owner in window[:-1]]
    kv = turns([problem.kv(owner) for owner in first], 2) + turns([problem.kv(owner) for owner in others], 2)
    d_kv = sum(sums(problem, [problem.d_kv(owner) for owner in owners], 2) for owners in (last, before))
    own = problem.d_kv(rank)
    arrived = 2 * nbytes(problem.sent(own)) + largest(
        [problem.sent(problem.d_kv(owner)) for owner in range(problem.ranks)]
    )
    return (
        Pass(kv, total(running(problem, rank))),
        Pass(nbytes(own) + d_kv + arrived, nbytes(problem.d_q(rank))),
    )


def _grid(problem: Problem, rank: int, outer: int, order: Sequence[int] | None) -> tuple[list[list[int]], int, int]:
    """Return the ranks row by row, and a rank's row and column."""
    ranks = list(range(problem.ranks) if order is None else order)
    inner = problem.ranks // outer
    return [ranks[row * inner :][:inner] for row in range(outer)], *divmod(ranks.index(rank), inner)
