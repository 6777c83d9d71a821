"""Tokens for heads in groups, and a ring or a mesh of the ranks with the same heads."""

from __future__ import annotations

from dataclasses import replace

from ..problems.problem import Problem
from . import exchange, mesh, ring
from .memory import Pass
from .traffic import Costs


def costs(problem: Problem, rank: int, ulysses: int, rows: int, cols: int = 1) -> Costs:
    """The exchange in the group, and a ring or a mesh of the ranks with the same heads."""
    group = exchange.costs(problem, rank, _group(rank, ulysses))
    chunks, number = _chunks(problem, rank, ulysses, rows * cols), rank // ulysses
    if not chunks.heads:
        return group
    inner = ring.costs(chunks, number) if cols == 1 else mesh.costs(chunks, number, rows, cols)
    return Costs(group.forward + inner.forward, group.backward + inner.backward)


def memory(problem: Problem, rank: int, ulysses: int, rows: int, cols: int = 1, ahead: int = 0) -> tuple[Pass, Pass]:
    """Return the memory of the exchange in the group and of the ring or mesh of equal heads; `ahead`: see `ring`."""
    chunks, number = _chunks(problem, rank, ulysses, rows * cols), rank // ulysses
    inner = Pass(), Pass()
    if chunks.heads:
        inner = ring.memory(chunks, number, ahead) if cols == 1 else mesh.memory(chunks, number, rows, cols)
    return exchange.memory(problem, rank, _group(rank, ulysses), inner)


def _group(rank: int, ulysses: int) -> range:
    """Return the ranks of a rank's group."""
    first = rank // ulysses * ulysses
    return range(first, first + ulysses)


def _chunks(problem: Problem, rank: int, ulysses: int, groups: int) -> Problem:
    """Return the groups' problem with the heads that a rank has in its group."""
    *_, part = problem.by_heads(ulysses)[rank % ulysses]
    return replace(part, ranks=groups, layout=problem.layout.partition("/")[0])
