"""K/V on a ring."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from ..problems.travel import travels
from .memory import Pass, around, arriving, running, sums, total, turns
from .traffic import Costs, collect, sent, spread


def costs(problem: Problem, rank: int) -> Costs:
    """K/V once around; backward dK/dV behind them."""
    ways, owners = travels(problem.needed.T), range(problem.ranks)
    kv = spread(ways, rank, owners, problem.kv)
    return Costs(kv, kv + collect(ways, rank, owners, sent(problem, problem.d_kv)))


def memory(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Two buffers of K/V; backward two of dK/dV, the own ones, and two for those that arrive."""
    owners = around(range(problem.ranks), rank)
    d_kv = [problem.d_kv(owner) for owner in owners]
    kept = nbytes(problem.d_q(rank)) + nbytes(d_kv[0]) + sums(problem, d_kv, 2) + arriving(problem, d_kv)
    return (
        Pass(turns([problem.kv(owner) for owner in owners], 2), total(running(problem, rank))),
        Pass(kept),
    )
