"""All inputs on rank 0, which computes."""

from __future__ import annotations

from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, largest, running, total
from .traffic import Costs, messages


def costs(problem: Problem, rank: int) -> Costs:
    """All to rank 0, results back."""
    if rank == 0:
        others = range(1, problem.ranks)
        return Costs(
            messages([problem.q(r) + problem.kv(r) for r in others]),
            messages([problem.q_backward(r) + problem.kv(r) for r in others]),
        )
    return Costs(messages([problem.o(rank)]), messages([problem.d_q(rank) + problem.d_kv(rank)]))


def memory(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Return the memory: on rank 0 what arrived, the arrays joined of it, and the results, also in parts."""
    ranks = range(problem.ranks)
    inputs = [problem.q(r) + problem.kv(r) for r in ranks]
    inputs_backward = [problem.q_backward(r) + problem.kv(r) for r in ranks]
    results = [problem.o(r) for r in ranks]
    results_backward = [problem.d_q(r) + problem.d_kv(r) for r in ranks]
    if rank:
        return (
            Pass(nbytes(inputs[rank]) + nbytes(results[rank])),
            Pass(nbytes(inputs_backward[rank]) + nbytes(results_backward[rank])),
        )
    states = [running(problem, r) for r in ranks]
    return (
        Pass(
            nbytes(inputs[0]) + total(results),
            inside=total(inputs[1:]) + total(inputs) + sum(map(total, states)) + max(map(total, states)),
        ),
        Pass(
            nbytes(inputs_backward[0]) + total(results_backward),
            inside=total(inputs_backward[1:])
            + total(inputs_backward)
            + total(results_backward)
            + largest(results_backward),
        ),
    )
