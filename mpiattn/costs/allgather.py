"""K/V of all ranks on each."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, largest, running, total, turns
from .traffic import Costs, pieces


def costs(problem: Problem, rank: int, head_groups: int = 1) -> Costs:
    """K/V of each group of heads from every other rank; backward dK/dV of each one that has computed any, too."""
    others = [owner for owner in range(problem.ranks) if owner != rank]
    parts = [part for *_, part in problem.by_heads(min(head_groups, problem.kv_heads))]
    kv = pieces([part.kv(owner) for part in parts for owner in others])
    users = [user for user in others if problem.needed[user, rank]]
    return Costs(kv, kv + pieces([part.d_kv(rank) for part in parts for _ in users]))


def memory(problem: Problem, rank: int, head_groups: int = 1) -> tuple[Pass, Pass]:
    """K/V of two groups of heads from all ranks, and dK/dV for all; of one group what the others have of its own."""
    ranks = range(problem.ranks)
    parts = [part for *_, part in problem.by_heads(min(head_groups, problem.kv_heads))]
    kv = turns([part.kv(rank) for part in parts], 2) + turns(
        [[s for r in ranks for s in part.kv(r)] for part in parts], 2
    )
    d_kv = sum(turns([part.d_kv(r) for part in parts], 2) for r in ranks)
    d_kv += (problem.ranks - 1) * largest([part.d_kv(rank) for part in parts])
    return (
        Pass(kv, total(running(problem, rank))),
        Pass(d_kv, nbytes(problem.d_q(rank)) + nbytes(problem.d_kv(rank))),
    )
