"""K/V on a ring in the memory that the ranks of a host share."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, running, total
from .traffic import Costs, Traffic


def costs(problem: Problem, rank: int) -> Costs:
    """Read in place, in the memory of the host: nothing is received."""
    return Costs(Traffic(), Traffic())


def memory(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Its part of the window, for K/V and for dK/dV."""
    window = nbytes(problem.d_kv(rank) + problem.kv(rank))
    return Pass(window, total(running(problem, rank))), Pass(0, nbytes(problem.d_q(rank)))
