"""Tokens for heads and back, in a group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..arrays import Spec
from ..messages.parcel import nbytes
from ..problems.problem import Problem
from .memory import Pass, largest, running, total
from .traffic import Costs, pieces


def costs(problem: Problem, rank: int, members: Sequence[int]) -> Costs:
    """Tokens for heads and back, among the ranks of a group."""
    own, others, partial = _parts(problem, rank, members)
    tokens = [member for member in members if member != rank]
    return Costs(
        pieces([own.qkv(member) for member in tokens] + [part.out(rank) for part in others]),
        pieces([own.d_out(member) for member in tokens] + [part.d_qkv(rank, partial) for part in others]),
    )


def memory(problem: Problem, rank: int, members: Sequence[int], inner: tuple[Pass, Pass]) -> tuple[Pass, Pass]:
    """Return the memory of an exchange in a group: pieces there and back, arrays joined of them, and the inner pass."""
    own, others, partial = _parts(problem, rank, members)

    def exchanged(spec: Callable[[Problem, int], list[Spec]]) -> int:
        return total([spec(part, rank) for part in others]) + total([spec(own, member) for member in members])

    forward, backward = inner
    return (
        Pass(
            exchanged(Problem.qkv)
            + total([own.qkv(member) for member in members])
            + forward.kept
            + nbytes(problem.o(rank))
            + exchanged(Problem.out),
            inside=forward.sums + max(total(running(own, member)) for member in members),
        ),
        Pass(
            exchanged(Problem.d_out)
            + total([own.d_out(member) for member in members])
            + backward.kept
            + nbytes(problem.d_kv(rank) + problem.d_q(rank))
            + exchanged(lambda part, owner: part.d_qkv(owner, partial)),
            inside=backward.sums + largest([own.d_kv(member) + own.d_q(member) for member in members]),
        ),
    )


def _parts(problem: Problem, rank: int, members: Sequence[int]) -> tuple[Problem, list[Problem], bool]:
    """Return the problem of a rank's heads, of the others in the group, and whether K/V heads are in several."""
    parts = [part for *_, part in problem.by_heads(len(members))]
    partial = sum(part.kv_heads for part in parts) > problem.kv_heads
    own = parts.pop(members.index(rank))
    return own, parts, partial
