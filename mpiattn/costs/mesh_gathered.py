"""Q and K/V of a tile of a grid, by collectives."""

from __future__ import annotations

from collections.abc import Sequence

from ..arrays import Spec
from ..messages.parcel import nbytes
from ..problems import grid
from ..problems.problem import Problem
from .memory import Pass, largest, running, total
from .traffic import Costs, pieces


def costs(problem: Problem, rank: int, rows: int, cols: int) -> Costs:
    """Q from the row, K/V from the column, and of this rank's sums what each rank there has computed."""
    r, c = divmod(rank, cols)
    tile = problem.needed.reshape(rows, cols, rows, cols)
    in_row, in_col = ([owner for owner in line if owner != rank] for line in grid.lines(rank, rows, cols))
    q_shares = sum(bool(tile[r, c, :, place].any()) for place in range(cols) if place != c)
    kv_shares = sum(bool(tile[place, :, r, c].any()) for place in range(rows) if place != r)
    kv = pieces([problem.kv(owner) for owner in in_col])
    return Costs(
        pieces([problem.q(owner) for owner in in_row]) + kv + pieces([problem.sent(problem.o(rank))] * q_shares),
        pieces([problem.q_backward(owner) for owner in in_row])
        + kv
        + pieces([problem.sent(problem.d_q(rank))] * q_shares)
        + pieces([problem.sent(problem.d_kv(rank))] * kv_shares),
    )


def memory(problem: Problem, rank: int, rows: int, cols: int) -> tuple[Pass, Pass]:
    """The tile's Q and K/V as they arrive and joined, its sums, these in parts, and the sums of its own chunks."""

    def padded(parcels: Sequence[Sequence[Spec]]) -> int:
        return sum(-(-nbytes(parcel) // 8) * 8 for parcel in parcels)

    def exchanged(parcels: Sequence[list[Spec]], place: int) -> int:
        travelling = [problem.sent(parcel) for parcel in parcels]
        return nbytes(parcels[place]) + padded(travelling) + padded([travelling[place]] * len(parcels))

    r, c = divmod(rank, cols)
    in_row, in_col = grid.lines(rank, rows, cols)
    q, kv = [problem.q(owner) for owner in in_row], [problem.kv(owner) for owner in in_col]
    o, states = [problem.o(owner) for owner in in_row], [running(problem, owner) for owner in in_row]
    q_backward = [problem.q_backward(owner) for owner in in_row]
    d_q, d_kv = [problem.d_q(owner) for owner in in_row], [problem.d_kv(owner) for owner in in_col]
    home_q, home_kv = exchanged(d_q, c), exchanged(d_kv, r)
    computed = total(q_backward) + total(kv) + total(d_q) + total(d_kv)
    return (
        Pass(
            padded(q) + padded(kv) + exchanged(o, c),
            inside=total(q) + total(kv) + sum(map(total, states)) + max(map(total, states)),
        ),
        Pass(
            padded(q_backward) + home_q + home_kv,
            inside=computed + max(largest(d_q) - home_kv, largest(d_kv)),  # dQ goes before there are buffers for dK/dV
        ),
    )
