"""Mesh-Attention (arXiv 2512.20968): each rank computes a two-dimensional tile of the attention matrix.

The ranks form a grid. The ranks of a row share their queries: Q travels along the row, and the partial
outputs return along it. The ranks of a column share their keys: K/V travel along the column. With 2 x 3
ranks, rank (r, c) has index 3 r + c and computes

            K/V 0      1      2      3      4      5
    Q 0..2   (0,0)  (0,1)  (0,2)  (0,0)  (0,1)  (0,2)
    Q 3..5   (1,0)  (1,1)  (1,2)  (1,0)  (1,1)  (1,2)

so each pair of chunks is computed once, and a rank's own queries meet its own keys in its own tile.
Slot j of a rank holds the queries that have made j hops, slot i the keys that have; all ranks follow one
list of steps in these coordinates (`schedule.py`), with at most one message each way at a time.
One column is Ring Attention; one row passes queries only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import grid, schedule
from ..arrays import Array, Parcel
from ..mask import Positions
from ..message import Communicator, Tag, Testall, Waitall
from ..problem import Problem, Travel, travels
from ..schedule import Op, Step
from .base import Attention
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


Block = tuple[int, int, slice, Positions]
"""KV slot and Q slot of a block, which of the queries, and their positions."""


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
        """Make the order of steps, and how far each chunk of this row and this column travels."""
        a, b = self.cols, self.rows
        self.q_owners = [self.r * a + (self.c - hop) % a for hop in range(a)]
        self.kv_owners = [(self.r - hop) % b * a + self.c for hop in range(b)]
        tile = problem.needed.reshape(b, a, b, a)  # row and column of the queries, then of the keys
        costs = {
            "heads": problem.heads, "kv_heads": problem.kv_heads, "head_dim": problem.head_dim,
            "itemsize": problem.dtype.itemsize, "partial_itemsize": problem.sent(problem.d_q(0))[0][1].itemsize,
        }  # fmt: skip
        self.forward_steps, self.backward_steps = (
            order(b, a, schedule.relative(backward=backward, **costs).balanced(b, a))
            for order, backward in ((schedule.forward, False), (schedule.backward, True))
        )
        self.forward_blocks, self.backward_blocks = (
            self.blocks(problem, steps) for steps in (self.forward_steps, self.backward_steps)
        )
        self.q_travels = travels(tile[self.r].any(axis=1))
        self.kv_travels = travels(tile[:, :, :, self.c].any(axis=1).T)

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Follow the forward schedule."""
        qs = self.parcels("q", [problem.q(owner) for owner in self.q_owners], anew=True)
        kvs = self.parcels("kv", [problem.kv(owner) for owner in self.kv_owners], anew=True)
        specs = [problem.o(owner) for owner in self.q_owners]
        outs, shares = self.sums("o", specs, anew=True), self.arriving("o", specs)
        for state in outs:
            self.kernel.begin(*state.arrays)
        if self.q_travels[self.c].last:
            qs[0].pack(q)
        if self.kv_travels[self.r].last:
            kvs[0].pack(k, v)
        for step, blocks in zip(self.forward_steps, self.forward_blocks, strict=True):
            requests: list[Any] = []
            match step.message:
                case Op.Q:
                    requests = spread(self.row, qs, step.hop, self.q_travels, Tag.Q)
                case Op.KV:
                    requests = spread(self.col, kvs, step.hop, self.kv_travels, Tag.KV)
                case Op.O:
                    requests = self.collect(self.row, outs, shares, step.hop, self.q_travels, Tag.O)
            for i, j, part, positions in blocks:
                rows, near = qs[j].arrays if j else [q], kvs[i].arrays if i else [k, v]
                near_q, out, lse = (array[:, :, part] for array in (*rows, *outs[j].arrays))
                where, progress = (positions, problem.kv_positions[self.kv_owners[i]]), partial(Testall, requests)
                self.kernel.forward(near_q, *near, *where, out, lse, progress)
            Waitall(requests)
        out, lse = self.kernel.complete(outs[0].arrays, *home(self.row, shares, self.q_travels))
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Follow the backward schedule."""
        qs = self.parcels("q backward", [problem.q_backward(owner) for owner in self.q_owners], anew=True)
        kvs = self.parcels("kv", [problem.kv(owner) for owner in self.kv_owners], anew=True)
        specs = [problem.d_q(owner) for owner in self.q_owners]
        d_qs, q_shares = self.sums("d_q", specs), self.arriving("d_q", specs)
        specs = [problem.d_kv(owner) for owner in self.kv_owners]
        d_kvs, kv_shares = self.sums("d_kv", specs), self.arriving("d_kv", specs)
        for total in d_qs + d_kvs:
            self.kernel.begin(*total.arrays)
        if self.q_travels[self.c].last:
            qs[0].pack(lse, row_delta, q, d_out)
        if self.kv_travels[self.r].last:
            kvs[0].pack(k, v)
        for step, blocks in zip(self.backward_steps, self.backward_blocks, strict=True):
            requests: list[Any] = []
            match step.message:
                case Op.Q:
                    requests = spread(self.row, qs, step.hop, self.q_travels, Tag.Q)
                case Op.KV:
                    requests = spread(self.col, kvs, step.hop, self.kv_travels, Tag.KV)
                case Op.DQ:
                    requests = self.collect(self.row, d_qs, q_shares, step.hop, self.q_travels, Tag.D_Q)
                case Op.DKV:
                    requests = self.collect(self.col, d_kvs, kv_shares, step.hop, self.kv_travels, Tag.D_KV)
            for i, j, part, positions in blocks:
                rows, near = qs[j].arrays if j else [lse, row_delta, q, d_out], kvs[i].arrays if i else [k, v]
                near_lse, near_delta, near_q, gradient, d_q = (a[:, :, part] for a in (*rows, *d_qs[j].arrays))
                where, progress = (positions, problem.kv_positions[self.kv_owners[i]]), partial(Testall, requests)
                rows = [gradient, near_lse, near_delta]
                self.kernel.backward(near_q, *near, *rows, *where, d_q, *d_kvs[i].arrays, progress)
            Waitall(requests)
        [d_q] = self.kernel.complete(d_qs[0].arrays, *home(self.row, q_shares, self.q_travels))
        d_k, d_v = self.kernel.complete(d_kvs[0].arrays, *home(self.col, kv_shares, self.kv_travels))
        return d_q, d_k, d_v

    def blocks(self, problem: Problem, steps: Sequence[Step]) -> list[list[Block]]:
        """Return the blocks of each step that the mask leaves something of.

        Where the first or the last message has none to hide behind, the own block is shared out to both.
        """
        own = self.q_owners[0]
        table = []
        for step in steps:
            needed = [(i, j) for i, j in step.blocks if problem.needed[self.q_owners[j], self.kv_owners[i]]]
            table.append([(i, j, slice(None), problem.q_positions[self.q_owners[j]]) for i, j in needed])
        if problem.needed[own, own] and len(steps) > 1 and not (table[0] and table[-1]):
            table = [[block for block in blocks if block[:2] != (0, 0)] for blocks in table]
            for blocks, (part, positions) in zip((table[0], table[-1]), problem.halves(own), strict=True):
                blocks += [(0, 0, part, positions)] if len(positions) else []
        return table

    def collect(
        self,
        ring: Communicator,
        slots: Sequence[Parcel],
        shares: Sequence[Parcel],
        hop: int,
        ways: Sequence[Travel],
        tag: Tag,
    ) -> list[Any]:
        """Post one hop of the sums on their way home: slot hop leaves, a share of slot hop+1 arrives.

        The sum for an owner starts at the first user of its chunk and passes the others, who add what they have
        in this slot; the last user sends it to the owner, to slot 0.
        """
        size, rank = ring.Get_size(), ring.Get_rank()
        source, dest = ring.Shift(0, 1)
        requests = []
        owner = (rank - hop) % size
        way = ways[owner]
        if way.first <= hop <= way.last:
            self.kernel.settle(slots[hop], *([shares[hop].arrays] if way.first < hop else []))
            requests.append(ring.Isend(slots[hop].message, dest if hop < way.last else owner, tag))
        way = ways[(rank - hop - 1) % size]
        if way.first <= hop < way.last:
            requests.append(ring.Irecv(shares[hop + 1].message, source, tag))
        if ways[rank].last == hop:
            requests.append(ring.Irecv(shares[0].message, (rank + hop) % size, tag))
        return requests

    def free(self) -> None:
        """Free the communicators of the grid, its row and its column."""
        for comm in (self.row, self.col, self.grid):
            comm.Free()


def spread(ring: Communicator, slots: Sequence[Parcel], hop: int, ways: Sequence[Travel], tag: Tag) -> list[Any]:
    """Post one hop of the chunks that travel round a row or a column: slot hop-1 leaves, slot hop arrives."""
    size, rank = ring.Get_size(), ring.Get_rank()
    source, dest = ring.Shift(0, 1)
    requests = []
    if hop <= ways[(rank - hop) % size].last:
        requests.append(ring.Irecv(slots[hop].message, source, tag))
    if hop <= ways[(rank - hop + 1) % size].last:
        requests.append(ring.Isend(slots[hop - 1].message, dest, tag))
    return requests


def home(ring: Communicator, shares: Sequence[Parcel], ways: Sequence[Travel]) -> list[Sequence[Array]]:
    """Return the sum for this rank that has come home, if its chunk has travelled."""
    return [shares[0].arrays] if ways[ring.Get_rank()].last > 0 else []
