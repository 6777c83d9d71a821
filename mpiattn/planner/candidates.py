"""Candidates to choose from: the algorithms' own variants, those on grids with each way to place them on nodes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..algorithms import ALGORITHMS
from ..algorithms.spelling import fitting, parse, spell
from ..errors import InputError
from ..machines.machine import Machine
from ..problems.scalars import shown
from .task import Task

APART = {
    "dense": "one rank does all the work",
    "shared_ring": "works inside one host",
    "tensor_parallel": "every rank holds the whole sequence",
    "decode": "is for a few new tokens",
}
"""Algorithms that are no candidates, and why."""

GATHERED = ("allgather", "mesh_gathered")
"""Algorithms that compute nothing while their messages travel."""


@dataclass(frozen=True)
class Candidate:
    """An algorithm with its arguments, and how its grid lies on the nodes.

    Attributes
    ----------
    algorithm : str
    arguments : pairs of name and value
        Of the algorithm's constructor.
    inside : (int, int), optional
        Rows and columns of the grid that lie inside a node; None: ranks in the order of the nodes.
    """

    algorithm: str
    arguments: tuple[tuple[str, Any], ...] = ()
    inside: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The algorithm and its arguments, as text that every command takes."""
        return spell(self.algorithm, dict(self.arguments))

    @property
    def placement(self) -> str:
        """Its placement on the nodes, as text."""
        if self.inside is None:
            return "in order"
        return f"{self.inside[0]} x {self.inside[1]}"

    @property
    def title(self) -> str:
        """Both in one line."""
        return self.name + (f", {self.placement} of it inside a node" if self.inside else "")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        given = dict(self.arguments)
        return given["rows"], given["cols"]

    def shape(self, ranks: int) -> tuple[int, int, int]:
        """Return ranks that exchange heads for tokens, and rows and columns of the grid of such groups.

        A ring is a grid of one column, and so is an all-gather; Ulysses is a single group.
        """
        given = dict(self.arguments)
        group = ranks if self.algorithm == "ulysses" else given.get("ulysses", 1)
        return group, given.get("rows", ranks // group), given.get("cols", 1)

    def order(self, ranks: int) -> list[int]:
        """Return the place of each of the cluster's ranks in the communicator that the algorithm is given."""
        if self.inside is None:
            return list(range(ranks))
        (group, rows, cols), (near_rows, near_cols) = self.shape(ranks), self.inside
        places = np.arange(ranks).reshape(rows // near_rows, near_rows, cols // near_cols, near_cols, group)
        return [int(place) for place in places.transpose(0, 2, 1, 3, 4).reshape(-1)]


def candidates(ranks: int, machine: Machine, algorithms: Sequence[str] | None = None) -> list[Candidate]:
    """Return every variant of every algorithm, those on grids with each way to place them on nodes.

    Algorithms are given by name, or with arguments, such as `mesh:4x4`.
    """
    every = [name for name in ALGORITHMS if name not in APART]
    texts = every if algorithms is None else algorithms
    several = isinstance(texts, Collection) and not isinstance(texts, str)
    if not several or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"algorithms are names in a list, such as ['ring', 'mesh'], got {shown(texts)}")
    if apart := [f"{text}: {APART[text]}" for text in texts if text in APART]:
        raise InputError(f"nothing to plan for {'; '.join(apart)}")
    asked = [parse(text, among=every) for text in texts]
    result = []
    for name, given in asked:
        for arguments in fitting(name, given, ranks):
            plain = Candidate(name, tuple(arguments.items()))
            group, rows, cols = plain.shape(ranks)
            near = per_node(machine, ranks) // group
            if "rows" in arguments and min(rows, cols) > 1 and 1 < near < rows * cols:
                ways = [(r, near // r) for r in range(1, near + 1) if near % r == 0]
                fits = [(r, c) for r, c in ways if rows % r == 0 and cols % c == 0]
                result += [Candidate(name, plain.arguments, way) for way in fits] or [plain]
            else:
                result.append(plain)
    return result


def per_node(machine: Machine, ranks: int) -> int:
    """Return how many ranks a node has: all, where one node has room for them, else what divides them evenly."""
    return ranks if ranks <= machine.ranks_per_node else math.gcd(machine.ranks_per_node, ranks)


def tile(task: Task, ranks: int, candidate: Candidate) -> tuple[int, int]:
    """Return how many queries and keys a rank's tile has; a ring's has one chunk of queries, and all keys."""
    group, rows, cols = candidate.shape(ranks)
    kv_tokens = task.kv_tokens or task.tokens
    chunk, kv_chunk = (-(-tokens * group // ranks) for tokens in (task.tokens, kv_tokens))
    return min(chunk * cols, task.tokens), min(kv_chunk * rows, kv_tokens)
