"""New tokens on all ranks, their keys and values spread."""

from __future__ import annotations

import math

from ..messages.parcel import nbytes
from ..messages.reduction import even
from ..problems.kv_cache import CacheProblem
from .memory import Pass
from .traffic import Costs, allreduce, messages


def costs(problem: CacheProblem, rank: int, combine: str = "allreduce") -> Costs:
    """All-reduces of lse, and of out and its weight; or (out, lse) from below in the tree, and from above."""
    if combine == "allreduce":
        [(shape, wide), (rows, _)], [d_q] = problem.o(rank), problem.d_q(rank)
        parts = (rows, wide), ((*rows, shape[3] + 1), wide), d_q
        top, sums, d_q_sum = (allreduce(part, problem.ranks, rank) for part in parts)
        return Costs(top + sums, d_q_sum)
    steps = [2**level for level in range((problem.ranks - 1).bit_length())]
    below = [step for step in steps if rank % (2 * step) == 0 and any(problem.sees[rank + step :][:step])]
    received = len(below) + (rank > 0)
    return Costs(messages([problem.o(rank)] * received), messages([problem.d_q(rank)] * received))


def memory(problem: CacheProblem, rank: int, combine: str = "allreduce") -> tuple[Pass, Pass]:
    """Partial results of the new tokens; their sums, and what arrives of these, or rows to normalise them."""
    o, d_q, d_kv = nbytes(problem.o(rank)), nbytes(problem.d_q(rank)), nbytes(problem.d_kv(rank))
    if combine == "tree":
        return Pass(2 * o), Pass(2 * d_q, d_kv)
    (shape, wide), row = problem.o(rank)[1], nbytes(problem.o(rank)[1:])

    def arriving(nbytes: int) -> int:
        size = int(wide.itemsize)
        return (problem.ranks - 1) * even(nbytes // size, problem.ranks)[rank] * size

    return (
        Pass(o, o + row, o + row + max(3 * row + math.prod(shape), arriving(o))),
        Pass(d_q, d_kv, d_kv + arriving(d_q)),
    )
