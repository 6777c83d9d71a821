"""Mesh-Attention (arXiv 2512.20968) in its gathered form: collect a whole tile, compute it, hand out the sums.

The grid and the tiles are those of `mesh.py`. Here each exchange is one collective:

    forward    row.Allgatherv Q                       col.Allgatherv K, V
               the tile: all queries of the row against all keys of the column
               row.Alltoallv partial out, lse         one merge each: the reduce-scatter of O
    backward   row.Allgatherv Q, dO, lse, delta       col.Allgatherv K, V
               the tile
               row.Alltoallv partial dQ               col.Alltoallv partial dK, dV: their reduce-scatters

It receives what the ring form receives, with nothing to compute meanwhile, and holds whole tiles. MPI's own
reduce-scatter can't merge (out, lse), so all partials go to the owner of the queries, who merges them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array, Spec
from ..arrays.operations import take
from ..arrays.places import Places
from ..arrays.softmax import merge
from ..messages.connection import private
from ..messages.message import Communicator, Pieces, constant
from ..messages.parcel import Parcel, nbytes
from ..problems import grid
from ..problems.block import Block
from ..problems.problem import Problem
from .base import Attention
from .options import Options
from .shares import join

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GatheredMeshAttention(Attention):
    """Mesh-Attention by collectives on a grid of rows x cols ranks.

    Parameters
    ----------
    comm, options
        See `Attention`.
    rows, cols : int, optional
        rows * cols is the number of ranks; by default the grid nearest to a square.

    Notes
    -----
    A mask saves compute, and partial results that are neutral aren't sent; Q, K, V are gathered all the same.
    """

    def __init__(
        self, comm: Communicator, *, rows: int | None = None, cols: int | None = None, **options: Unpack[Options]
    ) -> None:
        comm = private(comm)
        super().__init__(comm, partial(grid.check, comm.Get_size(), rows, cols), **options)
        self.rows, self.cols = grid.check(comm.Get_size(), rows, cols)
        self.connect(self.comm)

    def connect(self, comm: Communicator) -> None:
        """Make the grid, and of it this rank's row and column."""
        self.grid = comm.Create_cart([self.rows, self.cols], periods=[True, True], reorder=False)
        self.row = self.grid.Sub([False, True])
        self.col = self.grid.Sub([True, False])
        self.r, self.c = self.grid.Get_coords(self.grid.Get_rank())

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return every grid of that many ranks."""
        return [{"rows": rows, "cols": cols} for rows, cols in grid.grids(ranks)]

    def plan(self, problem: Problem) -> None:
        """Say whose queries and keys make this tile, and which ranks compute something for which."""
        self.q_owners, self.kv_owners = grid.lines(self.grid.Get_rank(), self.rows, self.cols)
        queries, self.q_places = problem.queries_of(self.q_owners)
        keys, self.kv_places = problem.keys_of(self.kv_owners)
        self.block = Block(problem.mask, queries, keys)
        tiles = problem.needed.reshape(self.rows, self.cols, self.rows, self.cols)
        self.q_users = tiles[self.r].any(axis=1)  # (owner in the row, rank in the row)
        self.kv_users = tiles[:, :, :, self.c].any(axis=1).T  # the same in the column

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend the row's queries to the column's keys; merge the row's partial results of this rank's queries."""
        [all_q] = self.all_gather(self.row, "q", [problem.q(o) for o in self.q_owners], self.q_places, q)
        all_k, all_v = self.all_gather(self.col, "kv", [problem.kv(o) for o in self.kv_owners], self.kv_places, k, v)
        out, lse = self.buffers.state(all_q)
        self.kernel.forward(all_q, all_k, all_v, block=self.block, out=out, lse=lse)
        specs = [problem.o(owner) for owner in self.q_owners]
        own, shares = self.exchange(self.row, "o", specs, self.q_places, self.q_users, out, lse)
        for share in shares:
            merge(*own.arrays, *share.arrays)
        own_out, own_lse = own.arrays
        return own_out, own_lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute the tile's part of the row's dQ and of the column's dK, dV; add up the sums of this rank's chunks."""
        specs = [problem.q_backward(owner) for owner in self.q_owners]
        all_lse, all_delta, all_q, all_d_out = self.all_gather(
            self.row, "q backward", specs, self.q_places, lse, delta, q, d_out
        )
        all_k, all_v = self.all_gather(self.col, "kv", [problem.kv(o) for o in self.kv_owners], self.kv_places, k, v)
        d_q, d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (all_q, all_k, all_v))
        self.kernel.backward(
            all_q, all_k, all_v, block=self.block, d_out=all_d_out, lse=all_lse, delta=all_delta, d_q=d_q, d_k=d_k,
            d_v=d_v,
        )  # fmt: skip
        specs = [problem.d_q(owner) for owner in self.q_owners]
        own_q, q_shares = self.exchange(self.row, "d_q", specs, self.q_places, self.q_users, d_q)
        specs = [problem.d_kv(owner) for owner in self.kv_owners]
        own_kv, kv_shares = self.exchange(self.col, "d_kv", specs, self.kv_places, self.kv_users, d_k, d_v)
        for own, shares in ((own_q, q_shares), (own_kv, kv_shares)):
            for share in shares:
                own.add(share)
        [own_d_q], (own_d_k, own_d_v) = own_q.arrays, own_kv.arrays
        return own_d_q, own_d_k, own_d_v

    def all_gather(
        self, line: Communicator, name: str, specs: Sequence[Sequence[Spec]], places: Sequence[Places], *own: Array
    ) -> list[Array]:
        """Return the arrays of all ranks of a row or a column, joined in the order of their positions."""
        parts, message = self.pieces(name, specs, [True] * len(specs))
        parts[line.Get_rank()].pack(*own)
        line.Allgatherv(constant("IN_PLACE"), message)
        return [join(arrays, places) for arrays in zip(*(part.arrays for part in parts), strict=True)]

    def exchange(
        self, line: Communicator, name: str, specs: Sequence[list[Spec]], places: Sequence[Places], users: Array,
        *sums: Array,
    ) -> tuple[Parcel, list[Parcel]]:  # fmt: skip
        """Send each owner of a row or a column its part of the sums; return its own part, and those that arrived."""
        rank, size = line.Get_rank(), line.Get_size()
        others = np.arange(size) != rank
        [own], specs = self.buffers.parcels(f"own {name}", specs[rank : rank + 1]), self.buffers.travelling(specs)
        leaving, sent = self.pieces(name, specs, users[:, rank] & others)
        arriving, received = self.pieces(f"arriving {name}", [specs[rank]] * size, users[rank] & others)
        for part, where in zip([*leaving[:rank], own, *leaving[rank + 1 :]], places, strict=True):
            part.pack(*(take(array, where) for array in sums))
        line.Alltoallv(sent, received)
        return own, [arriving[place] for place in np.flatnonzero(users[rank] & others)]

    def pieces(
        self, name: str, specs: Sequence[Sequence[Spec]], moved: Sequence[bool]
    ) -> tuple[list[Parcel], list[object]]:
        """Return a parcel for each rank in one aligned buffer, and the buffer as collectives take it."""
        sizes = [nbytes(spec) for spec in specs]
        *starts, end = itertools.accumulate((-(-size // 8) * 8 for size in sizes), initial=0)
        [whole] = self.buffers.parcels(name, [[((end,), np.dtype(np.uint8))]])
        parts = [Parcel(spec, whole.buffer[start:]) for spec, start in zip(specs, starts, strict=True)]
        counts = [size if moves else 0 for size, moves in zip(sizes, moved, strict=True)]
        return parts, Pieces(whole.buffer, counts, starts)
