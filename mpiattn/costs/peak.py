"""The most memory that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..messages.parcel import nbytes
from ..problems.kv_cache import heads_of
from ..problems.problem import Problem
from . import AHEAD, PASSES


@dataclass(frozen=True)
class Peak:
    """The most bytes that one rank holds at one moment."""

    forward: int
    backward: int


def peak(name: str, problem: Problem, rank: int, queued: bool = False, **arguments: int | str) -> Peak:
    """Return the most that a rank holds in an algorithm, by its name and its own arguments.

    `queued` says whether work on the arrays is queued, as on GPUs. The kernel's workspace is not counted.
    """
    if queued and name in AHEAD:
        arguments["ahead"] = 1
    if problem.spread_heads:
        heads, kv_heads = problem.spread_heads[rank]
        problem = replace(problem, heads=heads, kv_heads=kv_heads)
    forward, backward = PASSES[name](problem, rank, **arguments)
    result = problem
    if arguments.get("combine") == "alltoall":  # of this rank's heads
        own = heads_of(problem.heads, problem.ranks, rank)
        result = replace(problem, heads=own.stop - own.start)
    saved, row_delta = nbytes(result.out(rank)), nbytes(result.d_out(rank)[1:2])
    gradients = nbytes(problem.qkv(rank))
    return Peak(
        forward.kept + max(forward.inside, forward.sums + saved),
        forward.kept + saved + row_delta + backward.kept + max(backward.inside, backward.sums + gradients),
    )
