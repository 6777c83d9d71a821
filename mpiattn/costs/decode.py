"""New tokens on all ranks, their keys and values spread."""

from __future__ import annotations

import math

from ..arrays import Spec
from ..messages.parcel import nbytes
from ..messages.reduction import even
from ..problems.kv_cache import CacheProblem, heads_of, some_heads
from .memory import Pass
from .traffic import Costs, allreduce, messages, pieces


def costs(problem: CacheProblem, rank: int, combine: str = "allreduce") -> Costs:
    """All-reduces of lse, and of out and its weight; or (out, lse) from below in the tree, and from above.

    By an all-to-all it is this rank's heads of every other rank's (out, lse), so (n-1)/n of it all; backward the other
    heads of (lse, delta, dO), and an all-reduce of dQ.
    """
    if combine == "allreduce":
        parts = problem.o(rank)[1], _weighted(problem, rank), *problem.d_q(rank)
        top, sums, d_q_sum = (allreduce(part, problem.ranks, rank) for part in parts)
        return Costs(top + sums, d_q_sum)
    if combine == "alltoall":
        others = [other for other in range(problem.ranks) if other != rank]
        heads = [heads_of(problem.heads, problem.ranks, owner) for owner in range(problem.ranks)]
        forward = pieces([some_heads(problem.o(rank), heads[rank]) for other in others if problem.sees[other]])
        rows = [some_heads(problem.d_out(rank), heads[other]) for other in others if problem.sees[rank]]
        return Costs(forward, pieces(rows) + allreduce(problem.d_q(rank)[0], problem.ranks, rank))
    steps = [2**level for level in range((problem.ranks - 1).bit_length())]
    below = [step for step in steps if rank % (2 * step) == 0 and any(problem.sees[rank + step :][:step])]
    received = len(below) + (rank > 0)
    return Costs(messages([problem.o(rank)] * received), messages([problem.d_q(rank)] * received))


def memory(problem: CacheProblem, rank: int, combine: str = "allreduce") -> tuple[Pass, Pass]:
    """Partial results of the new tokens; their sums, and what arrives of these, or rows to normalise them.

    One rank combines nothing forward.
    """
    o, d_q, d_kv = nbytes(problem.o(rank)), nbytes(problem.d_q(rank)), nbytes(problem.d_kv(rank))
    size = int(problem.wide.itemsize)

    def arriving(nbytes: int) -> int:
        return (problem.ranks - 1) * even(nbytes // size, problem.ranks)[rank] * size

    if combine == "tree":
        return Pass(o if problem.ranks == 1 else 2 * o), Pass(2 * d_q, d_kv)
    if combine == "alltoall":
        shares = [heads_of(problem.heads, problem.ranks, owner) for owner in range(problem.ranks)]
        parts = [nbytes(some_heads(problem.o(rank), heads)) for heads in shares]
        rows = sum(nbytes(some_heads(problem.d_out(rank), heads)) for heads in shares)
        forward = Pass(o if problem.ranks == 1 else o + sum(parts) + problem.ranks * parts[rank])
        return forward, Pass(d_q + rows + nbytes(problem.d_out(rank)), d_kv, d_kv + arriving(d_q))
    backward = Pass(d_q, d_kv, d_kv + arriving(d_q))
    if problem.ranks == 1:
        return Pass(o), backward
    lse, weights, count = nbytes(problem.o(rank)[1:]), _weighted(problem, rank), math.prod(problem.o(rank)[1][0])
    sums = nbytes([weights])
    # Of each row while they are normalised: the sum of its weights, two lse, and whether there is anything.
    return (
        Pass(o, sums + lse, sums + lse + max(count * size + 2 * lse + count, arriving(sums))),
        backward,
    )


def _weighted(problem: CacheProblem, rank: int) -> Spec:
    """Return what all-reduces add up: see `softmax.weighted`."""
    (*rows, dim), wide = problem.o(rank)[0]
    return (*rows, dim + 1), wide
