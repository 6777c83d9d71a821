"""All tokens of some heads on each rank."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, running, total
from .traffic import Costs, allreduce


def costs(problem: Problem, rank: int, features: int = 0) -> Costs:
    """Nothing; with an output projection to that many features its all-reduce, and that of the input's gradient."""
    traffic = allreduce(((problem.batch, problem.q_tokens, features), problem.wide), problem.ranks, rank)
    return Costs(traffic, traffic)


def memory(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Sums only; `project` and `all_reduce` are the caller's."""
    return (
        Pass(0, total(running(problem, rank))),
        Pass(0, nbytes(problem.d_q(rank)) + nbytes(problem.d_kv(rank))),
    )
