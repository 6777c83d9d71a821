"""Q along the rows of a grid, K/V along its columns."""

from __future__ import annotations

from ..problems import grid
from ..problems.problem import Problem
from ..problems.travel import travels
from .memory import Pass, around, arriving, sums, total
from .traffic import Costs, collect, sent, spread


def costs(problem: Problem, rank: int, rows: int, cols: int) -> Costs:
    """Q and its sums along the row, K/V and theirs along the column."""
    r, c = divmod(rank, cols)
    tile = problem.needed.reshape(rows, cols, rows, cols)
    q_owners, kv_owners = grid.lines(rank, rows, cols)
    q_ways, kv_ways = travels(tile[r].any(axis=1)), travels(tile[:, :, :, c].any(axis=1).T)
    kv = spread(kv_ways, r, kv_owners, problem.kv)
    return Costs(
        spread(q_ways, c, q_owners, problem.q) + kv + collect(q_ways, c, q_owners, sent(problem, problem.o)),
        spread(q_ways, c, q_owners, problem.q_backward)
        + kv
        + collect(q_ways, c, q_owners, sent(problem, problem.d_q))
        + collect(kv_ways, r, kv_owners, sent(problem, problem.d_kv)),
    )


def memory(problem: Problem, rank: int, rows: int, cols: int) -> tuple[Pass, Pass]:
    """The tile's Q, K/V and sums, each in as many buffers as there are ranks, and two for each kind that arrives."""
    r, c = divmod(rank, cols)
    row, col = grid.lines(rank, rows, cols)
    in_row, in_col = around(row, c), around(col, r)
    o, d_q = [problem.o(owner) for owner in in_row], [problem.d_q(owner) for owner in in_row]
    d_kv = [problem.d_kv(owner) for owner in in_col]
    q, kv = total([problem.q(owner) for owner in in_row]), total([problem.kv(owner) for owner in in_col])
    forward = q + kv + sums(problem, o, cols) + arriving(problem, o)
    backward = total([problem.q_backward(owner) for owner in in_row])
    backward += sums(problem, d_q, cols) + arriving(problem, d_q)
    backward += sums(problem, d_kv, rows) + arriving(problem, d_kv)
    return Pass(forward), Pass(backward)
