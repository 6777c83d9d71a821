"""All-gather of K/V (as in Llama 3's training, arXiv 2407.21783, section 3.3.2): every rank gets all K/V.

Queries stay. One all-gather brings the K/V of all tokens to every rank, which then attends its queries to
them; one reduce-scatter of partial dK/dV takes the gradients home. With head groups, that is done for some
of the heads at a time: while the heads of one group are computed, the K/V of the next group arrive and the
dK/dV of the group before leave, and only two groups' K/V are held.

    all-gather K/V          0    1    2               of head groups, backward
    compute                      0    1    2
    reduce-scatter dK/dV              0    1    2
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array, Parcel, nbytes
from ..message import Communicator, Pieces, Testall, Waitall
from ..problem import Problem
from .base import Attention
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AllGatherAttention(Attention):
    """All-gather of K/V; backward once more, and a reduce-scatter of dK/dV.

    Parameters
    ----------
    comm, options
        See `Attention`.
    head_groups : int
        K/V heads are gathered in so many groups, one after the other: at most one for each K/V head.

    Notes
    -----
    The collectives leave the ways of the messages to the MPI library. They bring all K/V to all ranks: a mask
    saves compute but no messages. On an MPI-3 library a group's dK/dV must have less than 2**31 elements.
    """

    def __init__(self, comm: Communicator, *, head_groups: int = 1, **options: Unpack[Options]) -> None:
        super().__init__(comm, partial(check_groups, head_groups), **options)
        self.head_groups = head_groups
        self.size, self.rank = comm.Get_size(), comm.Get_rank()

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return one group, and two."""
        return [{}, {"head_groups": 2}]

    def plan(self, problem: Problem) -> None:
        """Cut the heads in groups, and make room for the K/V of two groups, those of all ranks one after the other."""
        self.groups = problem.by_heads(min(self.head_groups, problem.kv_heads))
        self.owners = range(self.size)
        parts = [part for *_, part in self.groups]
        self.own = self.parcels("own kv", [part.kv(self.rank) for part in parts], buffers=2)
        self.kv = self.parcels("kv", [[spec for o in self.owners for spec in part.kv(o)] for part in parts], buffers=2)
        # The blocks of this rank's queries that the mask leaves something of.
        self.blocks = [owner for owner in self.owners if problem.needed[self.rank, owner]]

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to all K/V, some heads at a time."""
        out, lse = self.state(problem, q)
        Waitall(self.gather(0, k, v))
        for step, (heads, *_) in enumerate(self.groups):
            requests = self.gather(step + 1, k, v)
            self.drop(heads)
            for owner in self.blocks:
                where = problem.q_positions[self.rank], problem.kv_positions[owner]
                near_k, near_v = self.kv[step].arrays[2 * owner : 2 * owner + 2]
                state, progress = (out[:, heads], lse[:, heads]), partial(Testall, requests)
                self.kernel.forward(q[:, heads], near_k, near_v, *where, *state, progress)
            Waitall(requests)
        return out, lse

    def gather(self, step: int, k: Array, v: Array) -> list[Any]:
        """Start to gather the K/V of a group of heads, if there is one more."""
        if step == len(self.groups):
            return []
        _, kv_heads, part = self.groups[step]
        self.own[step].pack(k[:, kv_heads], v[:, kv_heads])
        sizes = [nbytes(part.kv(owner)) for owner in self.owners]
        return [self.comm.Iallgatherv(self.own[step].message, Pieces(self.kv[step].buffer, sizes))]

    def drop(self, heads: slice) -> None:
        """Tell the kernel which heads are next: dropout goes by their numbers."""
        if self.dropout is not None:
            self.kernel.drop(self.dropout, heads.start)

    def reduce(self, part: Problem, sums: Parcel, own: Parcel) -> list[Any]:
        """Start to add up what all ranks have of a group's dK/dV, each owner's on its rank."""
        counts = [nbytes(part.d_kv(owner)) // part.wide.itemsize for owner in self.owners]
        return [self.comm.Ireduce_scatter(sums.buffer.view(part.wide), own.buffer.view(part.wide), counts)]

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute what this rank adds to all dK/dV, some heads at a time, and take them home."""
        d_q, d_k, d_v = (self.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
        parts = [part for *_, part in self.groups]
        own = self.parcels("own d_kv", [part.d_kv(self.rank) for part in parts])
        sums = self.parcels("d_kv", [[spec for o in self.owners for spec in part.d_kv(o)] for part in parts], buffers=2)
        Waitall(self.gather(0, k, v))
        requests: list[Any] = []
        for step, (heads, _, part) in enumerate(self.groups):
            requests += self.gather(step + 1, k, v)
            sums[step].buffer.fill(0)
            self.drop(heads)
            for owner in self.blocks:
                where = problem.q_positions[self.rank], problem.kv_positions[owner]
                pair = slice(2 * owner, 2 * owner + 2)
                (near_k, near_v), (sum_k, sum_v) = self.kv[step].arrays[pair], sums[step].arrays[pair]
                rows, totals = (d_out[:, heads], lse[:, heads], row_delta[:, heads]), (d_q[:, heads], sum_k, sum_v)
                self.kernel.backward(q[:, heads], near_k, near_v, *rows, *where, *totals, partial(Testall, requests))
            Waitall(requests)
            requests = self.reduce(part, sums[step], own[step])
        Waitall(requests)
        for (_, kv_heads, _), total in zip(self.groups, own, strict=True):
            d_k[:, kv_heads], d_v[:, kv_heads] = total.arrays
        return d_q, d_k, d_v


def check_groups(head_groups: int) -> None:
    """Raise ValueError where that is no number of groups."""
    if not isinstance(head_groups, int) or head_groups < 1:
        raise ValueError(f"head_groups is 1 or more, got {head_groups!r}")
