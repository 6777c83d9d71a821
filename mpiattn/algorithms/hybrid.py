"""Ulysses inside, a ring or a mesh outside (USP, arXiv 2405.07719): n = ulysses x rows x cols ranks.

    4 ranks, ulysses=2       ring of rank 0 and 2: heads 0, 1
    ulysses group a: rank 0   rank 1
    ulysses group b: rank 2   rank 3
                             ring of rank 1 and 3: heads 2, 3

The ranks of a group, neighbours in rank order and best in one host, together own one chunk of the sequence.
They exchange its tokens for heads, as in Ulysses. Then each attends in the ring of the ranks that have the
same heads, one of each group, where the chunks go round; and they exchange back. The rings know nothing
of the groups: they are Ring Attention or Mesh-Attention of fewer heads on fewer ranks with longer chunks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array
from ..messages.connection import private
from ..messages.message import Communicator
from ..problems import grid
from ..problems.problem import Problem
from ..problems.scalars import shown, whole
from .base import Attention
from .mesh import MeshAttention
from .options import Options
from .ring import RingAttention
from .ulysses import UlyssesAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HybridAttention(UlyssesAttention):
    """Ulysses in groups of ranks, and Ring Attention (one column) or Mesh-Attention between the groups.

    Parameters
    ----------
    comm, options
        See `Attention`. The layout says which chunk each group has; each rank has a run of its group's.
    ulysses : int, optional
        Ranks of a group; by default what `rows` and `cols` leave, or the grid nearest to a square.
    rows, cols : int, optional
        The groups' grid, as in `MeshAttention`; by default one column, which is a ring.

    Notes
    -----
    A mask saves messages of the ring or the mesh, none of the groups'.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        ulysses: int | None = None,
        rows: int | None = None,
        cols: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        comm = private(comm)
        self.asked = ulysses, rows, cols
        super().__init__(comm, partial(shape, comm.Get_size(), *self.asked), **options)
        options["layout"] = self.layout
        self.inner: Attention = (
            RingAttention(self.ring, **options)
            if self.cols == 1
            else MeshAttention(self.ring, rows=self.rows, cols=self.cols, **options)
        )
        if self.ulysses > 1:
            self.inner.compute_part()  # ranks of a group may share K/V heads, whose gradients are then added up
            self.layout = f"{self.layout}/{self.ulysses}"

    def connect(self, comm: Communicator) -> None:
        """Make the grid, and of it this rank's group and its ring."""
        self.ulysses, self.rows, self.cols = shape(comm.Get_size(), *self.asked)
        self.grid = comm.Create_cart([self.rows * self.cols, self.ulysses], periods=[True, True], reorder=False)
        self.group = self.grid.Sub([False, True])
        self.ring = self.grid.Sub([True, False])
        number = self.ring.Get_rank()
        self.members = list(range(number * self.ulysses, (number + 1) * self.ulysses))

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return every number of ranks in a group with every grid of the groups, but for one rank and one group."""
        every = [{"ulysses": ulysses, "rows": rows, "cols": cols} for ulysses, rows, cols in shapes(ranks)]
        return [variant for variant in every if 1 < variant["ulysses"] < ranks] or every

    def plan(self, problem: Problem) -> None:
        """Plan for the exchange in the group, and for the groups' problem with this rank's heads."""
        super().plan(problem)
        self.chunks = replace(self.part, ranks=self.rows * self.cols, layout=self.inner.layout)
        self.inner.first_head = self.first_head

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to all groups' chunks."""
        if not problem.heads:
            return super().attend(problem, q, k, v)
        return self.inner.attend(self.inner.prepare(self.chunks, q, self.dropout), q, k, v)

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Attend to all groups' chunks, backward."""
        if not problem.heads:
            return super().gradients(problem, q, k, v, d_out, lse, delta)
        return self.inner.gradients(self.inner.prepare(self.chunks, q, self.dropout), q, k, v, d_out, lse, delta)

    def end(self, why: str) -> None:
        """End what is between the groups, too."""
        self.inner.end(why)
        super().end(why)


def shapes(ranks: int) -> list[tuple[int, int, int]]:
    """Return every (ulysses, rows, cols) that makes that many ranks."""
    return [(ulysses, rows, cols) for ulysses, groups in grid.grids(ranks) for rows, cols in grid.grids(groups)]


def shape(ranks: int, ulysses: int | None, rows: int | None, cols: int | None) -> tuple[int, int, int]:
    """Return (ulysses, rows, cols), completed where some are None, or raise ValueError with those that fit."""
    given = ulysses, rows, cols
    ulysses, rows, cols = (None if number is None else whole(number) or 0 for number in given)
    if any(number is not None and number < 1 for number in (ulysses, rows, cols)):
        raise ValueError(f"ulysses, rows and cols are whole numbers, 1 or more, got {', '.join(map(shown, given))}")
    if ulysses is None:
        known = max(rows or 1, 1) * max(cols or 1, 1)
        ulysses = grid.squarest(ranks)[1] if rows is cols is None else ranks // known
    groups = ranks // max(ulysses, 1)
    if rows is None:
        rows = groups // max(cols or 1, 1)
    choice = (ulysses, rows, groups // max(rows, 1) if cols is None else cols)
    if choice not in shapes(ranks):
        fits = ", ".join("x".join(map(str, fit)) for fit in shapes(ranks))
        raise ValueError(
            f"ulysses x rows x cols = {'x'.join(map(shown, choice))} is not {ranks} ranks: choose from {fits}"
        )
    return choice
