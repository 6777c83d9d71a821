"""Mesh-Attention (arXiv 2512.20968): each rank computes a two-dimensional tile of the attention matrix.

The ranks form a grid. The ranks of a row share their queries: Q travels along the row, and the partial
outputs return along it. The ranks of a column share their keys: K/V travel along the column. With 2 x 3
ranks, rank (r, c) has index 3 r + c and computes

            K/V 0      1      2      3      4      5
    Q 0..2   (0,0)  (0,1)  (0,2)  (0,0)  (0,1)  (0,2)
    Q 3..5   (1,0)  (1,1)  (1,2)  (1,0)  (1,1)  (1,2)

so each pair of chunks is computed once, and a rank's own queries meet its own keys in its own tile.
One column is Ring Attention; one row passes queries only.

Slot j of a rank holds the queries that have made j hops along the row, slot i the K/V that have made i hops along the
column. All ranks follow one list of steps in these coordinates (see `schedule`), with at most one message each way at
a time; a block is computed while a later message is under way. On the 2 x 3 grid, in float32 with a head of K/V for
each head of queries, rank 0 does forward

    step  message    arrives                leaves                      computes (Q of, K/V of)
    1     Q hop 1    Q 2, from rank 2       Q 0, to rank 1              0, 0
    2     KV hop 1   K/V 3, from rank 3     K/V 0, to rank 3            2, 0
    3     Q hop 2    Q 1, from rank 2       Q 2, to rank 1              2, 3
    4     O hop 1    out 1, from rank 2     out 2, to rank 1            1, 0  1, 3
    5     O hop 2    out 0, from rank 2     out 1, home to rank 1       0, 3

An out that arrives is the sum of the ranks before, to which this one adds; that of its own queries, here out 0, comes
home whole. Backward, {Q, dO, lse, delta} travel the row and K/V the column; their sums go the same ways, dQ along the
row and dK/dV along the column. The first and the last message have no other block to hide behind here: rank 0's own
block, (0, 0), is cut in two for them.

    1     KV hop 1   K/V 3, from rank 3     K/V 0, to rank 3            0, 0
    2     Q hop 1    Q 2, from rank 2       Q 0, to rank 1              0, 3
    3     Q hop 2    Q 1, from rank 2       Q 2, to rank 1              2, 0  2, 3
    4     dQ hop 1   dQ 1, from rank 2      dQ 2, to rank 1             1, 3
    5     dKV hop 1  dK/dV 0, from rank 3   dK/dV 3, home to rank 3     1, 0
    6     dQ hop 2   dQ 0, from rank 2      dQ 1, home to rank 1        0, 0

A mask leaves the list as it is: steps lose the blocks and messages that nobody needs, and a rank's own block is cut in
two, forward or backward, where the first or the last message is left without another one (`schedule.tile.blocks`).
`ring.py` explains what shortens ways: `reaches`, `summed`, `joined`, `ends` and `leaves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array, Spec
from ..messages.connection import private
from ..messages.message import Cartesian, Communicator, Request, Tag, Testall, Waitall
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
        """Say whose chunk is in each slot, and how far it travels; make the order of steps and their blocks."""
        a, b = self.cols, self.rows
        self.q_owners = [self.r * a + (self.c - hop) % a for hop in range(a)]
        self.kv_owners = [(self.r - hop) % b * a + self.c for hop in range(b)]
        needed = problem.needed.reshape(b, a, b, a)  # row and column of the queries, then of the keys
        # A rank of the row uses a Q chunk where any key chunk of its own column needs it, and K/V the other way round.
        in_row, in_col = travels(needed[self.r].any(axis=1)), travels(needed[:, :, :, self.c].any(axis=1).T)
        self.q_ways = [in_row[(self.c - hop) % a] for hop in range(a)]
        self.kv_ways = [in_col[(self.r - hop) % b] for hop in range(b)]
        self.forward_steps, self.backward_steps = (
            list(zip(steps, tile.blocks(problem, steps, self.q_owners, self.kv_owners), strict=True))
            for steps in tile.steps(problem, b, a)
        )

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Follow the forward schedule."""
        qs = self.slots("q", [problem.q(owner) for owner in self.q_owners], self.q_ways, q)
        kvs = self.slots("kv", [problem.kv(owner) for owner in self.kv_owners], self.kv_ways, k, v)
        specs = [problem.o(owner) for owner in self.q_owners]
        outs = self.buffers.sums("o", specs, anew=True)  # (batch, heads, tokens, v_head_dim), (batch, heads, tokens)
        shares = self.buffers.arriving("o", specs)  # by slot: where the sum of other ranks of the row arrives
        for state in outs:
            self.kernel.begin(*state.arrays)
        for step, tasks in self.forward_steps:
            match step.message:
                case Op.Q:
                    posted = pass_on(self.row, qs, self.q_ways, Tag.Q, step.hop)
                case Op.KV:
                    posted = pass_on(self.col, kvs, self.kv_ways, Tag.KV, step.hop)
                case Op.O:
                    posted = self.collect(self.row, outs, shares, self.q_ways, Tag.O, step.hop)
                case _:
                    posted = []
            for i, j, block in tasks:  # KV slot, Q slot; slot 0 is read where the caller has it
                [q_j], (k_i, v_i) = qs[j].arrays if j else [q], kvs[i].arrays if i else [k, v]
                (out, lse), progress = outs[j].arrays, partial(Testall, posted)
                self.kernel.forward(q_j, k_i, v_i, block=block, out=out, lse=lse, progress=progress)
            Waitall(posted)
        out, lse = self.kernel.complete(outs[0].arrays, *home(shares, self.q_ways))
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Follow the backward schedule."""
        specs = [problem.q_backward(owner) for owner in self.q_owners]
        qs = self.slots("q backward", specs, self.q_ways, lse, delta, q, d_out)
        kvs = self.slots("kv", [problem.kv(owner) for owner in self.kv_owners], self.kv_ways, k, v)
        specs = [problem.d_q(owner) for owner in self.q_owners]
        d_qs, q_shares = self.buffers.sums("d_q", specs), self.buffers.arriving("d_q", specs)
        specs = [problem.d_kv(owner) for owner in self.kv_owners]
        d_kvs, kv_shares = self.buffers.sums("d_kv", specs), self.buffers.arriving("d_kv", specs)
        for total in d_qs + d_kvs:
            self.kernel.begin(*total.arrays)
        for step, tasks in self.backward_steps:
            match step.message:
                case Op.Q:
                    posted = pass_on(self.row, qs, self.q_ways, Tag.Q, step.hop)
                case Op.KV:
                    posted = pass_on(self.col, kvs, self.kv_ways, Tag.KV, step.hop)
                case Op.DQ:
                    posted = self.collect(self.row, d_qs, q_shares, self.q_ways, Tag.D_Q, step.hop)
                case Op.DKV:
                    posted = self.collect(self.col, d_kvs, kv_shares, self.kv_ways, Tag.D_KV, step.hop)
                case _:
                    posted = []
            for i, j, block in tasks:
                lse_j, delta_j, q_j, d_out_j = qs[j].arrays if j else [lse, delta, q, d_out]
                k_i, v_i = kvs[i].arrays if i else [k, v]
                [d_q], (d_k, d_v), progress = d_qs[j].arrays, d_kvs[i].arrays, partial(Testall, posted)
                self.kernel.backward(
                    q_j, k_i, v_i, block=block, d_out=d_out_j, lse=lse_j, delta=delta_j, d_q=d_q, d_k=d_k, d_v=d_v,
                    progress=progress,
                )  # fmt: skip
            Waitall(posted)
        [d_q] = self.kernel.complete(d_qs[0].arrays, *home(q_shares, self.q_ways))
        d_k, d_v = self.kernel.complete(d_kvs[0].arrays, *home(kv_shares, self.kv_ways))
        return d_q, d_k, d_v

    def slots(self, name: str, specs: Sequence[list[Spec]], ways: Sequence[Travel], *own: Array) -> list[Parcel]:
        """Return parcels for the chunks of a row or a column, with this rank's own chunk in slot 0 if it travels."""
        slots = self.buffers.parcels(name, specs, anew=True)
        if ways[0].leaves:
            slots[0].pack(*own)
        return slots

    def collect(
        self, line: Cartesian, sums: Sequence[Parcel], shares: Sequence[Parcel], ways: Sequence[Travel], tag: Tag,
        hop: int,
    ) -> list[Request]:  # fmt: skip
        """Post one hop of the sums on their way home: the sum in slot `hop` leaves, one for slot `hop + 1` arrives.

        The sum for an owner starts at the first user of its chunk and passes the others, who add what they have
        in this slot; the last user sends it to the owner, to slot 0.
        """
        size, rank, posted = line.Get_size(), line.Get_rank(), []
        source, dest = line.Shift(0, 1)
        if ways[hop].summed(hop):
            # This rank's part is complete, and so is the sum that arrived one hop before: now they are added.
            self.kernel.settle(sums[hop], *([shares[hop].arrays] if ways[hop].joined(hop) else []))
            posted.append(line.Isend(sums[hop].message, (rank - hop) % size if ways[hop].ends(hop) else dest, tag))
        if hop + 1 < size and ways[hop + 1].joined(hop + 1):
            posted.append(line.Irecv(shares[hop + 1].message, source, tag))
        if ways[0].ends(hop):  # the last user of this rank's chunk, hop ranks on, sends its sum now
            posted.append(line.Irecv(shares[0].message, (rank + hop) % size, tag))
        return posted


def pass_on(line: Cartesian, slots: Sequence[Parcel], ways: Sequence[Travel], tag: Tag, hop: int) -> list[Request]:
    """Post one hop of the chunks round a row or a column: what is in slot `hop - 1` leaves, slot `hop` arrives."""
    source, dest = line.Shift(0, 1)
    posted = []
    if ways[hop].reaches(hop):
        posted.append(line.Irecv(slots[hop].message, source, tag))
    if ways[hop - 1].reaches(hop):
        posted.append(line.Isend(slots[hop - 1].message, dest, tag))
    return posted


def home(shares: Sequence[Parcel], ways: Sequence[Travel]) -> list[Sequence[Array]]:
    """Return the sum for this rank that has come home, if its chunk has travelled."""
    return [shares[0].arrays] if ways[0].leaves else []
