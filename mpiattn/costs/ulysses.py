"""Tokens for heads and back."""

from __future__ import annotations

from ..problems.problem import Problem
from . import exchange
from .memory import Pass, running, total
from .traffic import Costs


def costs(problem: Problem, rank: int) -> Costs:
    """Some heads of every other rank's tokens; back, every other rank's heads of this rank's tokens."""
    return exchange.costs(problem, rank, range(problem.ranks))


def memory(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """All tokens of some heads: what is exchanged, joined, and computed of it."""
    members = range(problem.ranks)
    *_, part = problem.by_heads(problem.ranks)[rank]
    states = sum(total(running(part, member)) for member in members)
    gradients = total([part.d_q(member) + part.d_kv(member) for member in members])
    return exchange.memory(problem, rank, members, (Pass(0, states), Pass(0, gradients)))
