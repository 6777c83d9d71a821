"""K/V on a ring."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, around, arriving, running, sums, total, turns
from .traffic import Costs, collect, sent, spread


def costs(problem: Problem, rank: int) -> Costs:
    """K/V once around; backward dK/dV behind them."""
    ways, owners = problem.ways, range(problem.ranks)
    kv = spread(ways, rank, owners, problem.kv)
    return Costs(kv, kv + collect(ways, rank, owners, sent(problem, problem.d_kv)))


def memory(problem: Problem, rank: int, ahead: int = 0) -> tuple[Pass, Pass]:
    """Return the memory: two buffers of K/V; backward two of dK/dV, one of the rank's own, and two for arriving sums.

    `ahead` is the number of further buffers of K/V and of dK/dV with which messages run ahead of a GPU's queue.
    """
    owners = around(range(problem.ranks), rank)
    d_kv = [problem.d_kv(owner) for owner in owners]
    kept = nbytes(problem.d_q(rank)) + nbytes(d_kv[0]) + sums(problem, d_kv, 2 + ahead) + arriving(problem, d_kv)
    return (
        Pass(turns([problem.kv(owner) for owner in owners], 2 + ahead), total(running(problem, rank))),
        Pass(kept),
    )
