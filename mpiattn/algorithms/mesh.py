"""Mesh-Attention (arXiv 2512.20968): each rank computes a two-dimensional tile of the attention matrix.

The ranks form a grid. The ranks of a row share their queries: Q travels along the row, and the partial
outputs return along it. The ranks of a column share their keys: K/V travel along the column. With 2 x 3
ranks, rank (r, c) has index 3 r + c and computes

            K/V 0      1      2      3      4      5
    Q 0..2   (0,0)  (0,1)  (0,2)  (0,0)  (0,1)  (0,2)
    Q 3..5   (1,0)  (1,1)  (1,2)  (1,0)  (1,1)  (1,2)

so each pair of chunks is computed once, and a rank's own queries meet its own keys in its own tile.
Slot j of a rank holds the queries that have made j hops, slot i the keys that have; all ranks follow one
list of steps in these coordinates (see `schedule`), with at most one message each way at a time.
One column is Ring Attention; one row passes queries only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array, Spec
from ..messages.message import Cartesian, Communicator, Tag, Testall, Waitall
from ..messages.parcel import Parcel
from ..problems import grid
from ..problems.problem import Problem
from ..problems.travel import Travel, travels
from ..schedule import tile
from ..schedule.steps import Op
from .base import Attention
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


Posts = dict[Op, Callable[[int], list[Any]]]
"""What posts the messages of a hop, for each kind."""


class MeshAttention(Attention):
    """Mesh-Attention on a grid of rows x cols ranks.

    Parameters
    ----------
    comm, options
        See `Attention`.
    rows, cols : int, optional
        rows * cols is the number of ranks; by default the grid nearest to a square.

    Notes
    -----
    Forward: cols-1 messages of Q, rows-1 of K/V, cols-1 of partial out and lse. Backward: cols-1 of
    Q, dO, lse, delta; rows-1 of K/V; cols-1 of dQ; rows-1 of dK/dV. A chunk travels as far as its last user.
    """

    def __init__(
        self, comm: Communicator, *, rows: int | None = None, cols: int | None = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(comm, partial(grid.check, comm.Get_size(), rows, cols), **options)
        self.rows, self.cols = grid.check(comm.Get_size(), rows, cols)
        self.grid = comm.Create_cart([self.rows, self.cols], periods=[True, True], reorder=False)
        self.row = self.grid.Sub([False, True])
        self.col = self.grid.Sub([True, False])
        self.r, self.c = self.grid.Get_coords(self.grid.Get_rank())

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return every grid of that many ranks."""
        return [{"rows": rows, "cols": cols} for rows, cols in grid.grids(ranks)]

    def plan(self, problem: Problem) -> None:
        """Say whose chunk is in each slot, and how far it travels; make the order of steps and their blocks."""
        a, b = self.cols, self.rows
        self.q_owners = [self.r * a + (self.c - hop) % a for hop in range(a)]
        self.kv_owners = [(self.r - hop) % b * a + self.c for hop in range(b)]
        needed = problem.needed.reshape(b, a, b, a)  # row and column of the queries, then of the keys
        in_row, in_col = travels(needed[self.r].any(axis=1)), travels(needed[:, :, :, self.c].any(axis=1).T)
        self.q_ways = [in_row[(self.c - hop) % a] for hop in range(a)]
        self.kv_ways = [in_col[(self.r - hop) % b] for hop in range(b)]
        self.forward_steps, self.backward_steps = tile.steps(problem, b, a)
        self.forward_blocks, self.backward_blocks = (
            tile.blocks(problem, steps, self.q_owners, self.kv_owners)
            for steps in (self.forward_steps, self.backward_steps)
        )

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Follow the forward schedule."""
        qs = self.slots("q", [problem.q(owner) for owner in self.q_owners], self.q_ways, q)
        kvs = self.slots("kv", [problem.kv(owner) for owner in self.kv_owners], self.kv_ways, k, v)
        specs = [problem.o(owner) for owner in self.q_owners]
        outs, shares = self.sums("o", specs, anew=True), self.arriving("o", specs)
        for state in outs:
            self.kernel.begin(*state.arrays)
        post: Posts = {
            Op.Q: partial(spread, self.row, qs, self.q_ways, Tag.Q),
            Op.KV: partial(spread, self.col, kvs, self.kv_ways, Tag.KV),
            Op.O: partial(self.collect, self.row, outs, shares, self.q_ways, Tag.O),
        }
        for step, blocks in zip(self.forward_steps, self.forward_blocks, strict=True):
            requests = post[step.message](step.hop) if step.message else []
            for i, j, part, positions in blocks:
                rows, near = qs[j].arrays if j else [q], kvs[i].arrays if i else [k, v]
                near_q, out, lse = (array[:, :, part] for array in (*rows, *outs[j].arrays))
                where, progress = (positions, problem.kv_positions[self.kv_owners[i]]), partial(Testall, requests)
                self.kernel.forward(near_q, *near, *where, out, lse, progress)
            Waitall(requests)
        out, lse = self.kernel.complete(outs[0].arrays, *home(shares, self.q_ways))
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Follow the backward schedule."""
        specs = [problem.q_backward(owner) for owner in self.q_owners]
        qs = self.slots("q backward", specs, self.q_ways, lse, row_delta, q, d_out)
        kvs = self.slots("kv", [problem.kv(owner) for owner in self.kv_owners], self.kv_ways, k, v)
        specs = [problem.d_q(owner) for owner in self.q_owners]
        d_qs, q_shares = self.sums("d_q", specs), self.arriving("d_q", specs)
        specs = [problem.d_kv(owner) for owner in self.kv_owners]
        d_kvs, kv_shares = self.sums("d_kv", specs), self.arriving("d_kv", specs)
        for total in d_qs + d_kvs:
            self.kernel.begin(*total.arrays)
        post: Posts = {
            Op.Q: partial(spread, self.row, qs, self.q_ways, Tag.Q),
            Op.KV: partial(spread, self.col, kvs, self.kv_ways, Tag.KV),
            Op.DQ: partial(self.collect, self.row, d_qs, q_shares, self.q_ways, Tag.D_Q),
            Op.DKV: partial(self.collect, self.col, d_kvs, kv_shares, self.kv_ways, Tag.D_KV),
        }
        for step, blocks in zip(self.backward_steps, self.backward_blocks, strict=True):
            requests = post[step.message](step.hop) if step.message else []
            for i, j, part, positions in blocks:
                rows, near = qs[j].arrays if j else [lse, row_delta, q, d_out], kvs[i].arrays if i else [k, v]
                near_lse, near_delta, near_q, gradient, d_q = (a[:, :, part] for a in (*rows, *d_qs[j].arrays))
                where, progress = (positions, problem.kv_positions[self.kv_owners[i]]), partial(Testall, requests)
                rows = [gradient, near_lse, near_delta]
                self.kernel.backward(near_q, *near, *rows, *where, d_q, *d_kvs[i].arrays, progress)
            Waitall(requests)
        [d_q] = self.kernel.complete(d_qs[0].arrays, *home(q_shares, self.q_ways))
        d_k, d_v = self.kernel.complete(d_kvs[0].arrays, *home(kv_shares, self.kv_ways))
        return d_q, d_k, d_v

    def slots(self, name: str, specs: Sequence[list[Spec]], ways: Sequence[Travel], *own: Array) -> list[Parcel]:
        """Return parcels for the chunks of a row or a column, with the own one in slot 0 if it travels."""
        slots = self.parcels(name, specs, anew=True)
        if ways[0].last:
            slots[0].pack(*own)
        return slots

    def collect(
        self, ring: Cartesian, sums: Sequence[Parcel], shares: Sequence[Parcel], ways: Sequence[Travel], tag: Tag,
        hop: int,
    ) -> list[Any]:  # fmt: skip
        """Post one hop of the sums on their way home: slot hop leaves, a share of slot hop+1 arrives.

        The sum for an owner starts at the first user of its chunk and passes the others, who add what they have
        in this slot; the last user sends it to the owner, to slot 0.
        """
        size, rank = ring.Get_size(), ring.Get_rank()
        source, dest = ring.Shift(0, 1)
        requests = []
        if ways[hop].first <= hop <= ways[hop].last:
            self.kernel.settle(sums[hop], *([shares[hop].arrays] if ways[hop].first < hop else []))
            requests.append(ring.Isend(sums[hop].message, dest if hop < ways[hop].last else (rank - hop) % size, tag))
        if hop + 1 < size and ways[hop + 1].first <= hop < ways[hop + 1].last:
            requests.append(ring.Irecv(shares[hop + 1].message, source, tag))
        if ways[0].last == hop:
            requests.append(ring.Irecv(shares[0].message, (rank + hop) % size, tag))
        return requests

    def free(self) -> None:
        """Free the communicators of the grid, its row and its column."""
        for comm in (self.row, self.col, self.grid):
            comm.Free()


def spread(ring: Cartesian, slots: Sequence[Parcel], ways: Sequence[Travel], tag: Tag, hop: int) -> list[Any]:
    """Post one hop of the chunks that travel round a row or a column: slot hop-1 leaves, slot hop arrives."""
    source, dest = ring.Shift(0, 1)
    requests = []
    if hop <= ways[hop].last:
        requests.append(ring.Irecv(slots[hop].message, source, tag))
    if hop <= ways[hop - 1].last:
        requests.append(ring.Isend(slots[hop - 1].message, dest, tag))
    return requests


def home(shares: Sequence[Parcel], ways: Sequence[Travel]) -> list[Sequence[Array]]:
    """Return the sum for this rank that has come home, if its chunk has travelled."""
    return [shares[0].arrays] if ways[0].last > 0 else []
