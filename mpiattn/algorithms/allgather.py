"""All-gather of K/V (as in Llama 3's training, arXiv 2407.21783, section 3.3.2): every rank gets all K/V.

Queries stay. One all-gather brings the K/V of all tokens to every rank, which then attends its queries to
them; one reduce-scatter of partial dK/dV takes the gradients home. With head groups, that is done for some
of the heads at a time: while the heads of one group are computed, the K/V of the next group arrive and the
dK/dV of the group before leave, and only two groups' K/V are held.

The reduce-scatter is one message from each rank that has computed something of a chunk's dK/dV to the owner,
who adds them up in the order of the ranks: the same bits with every MPI library. See `reduction.py`.

    all-gather K/V          0    1    2               of head groups, backward
    compute                      0    1    2
    reduce-scatter dK/dV              0    1    2
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array
from ..arrays.operations import operations
from ..messages.message import Communicator, Pieces, Request, Tag, Testall, Waitall
from ..messages.parcel import Parcel, nbytes
from ..messages.reduction import exchange
from ..problems.problem import Problem
from ..problems.scalars import shown, whole
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
    The all-gather leaves the ways of the messages to the MPI library. It brings all K/V to all ranks: a mask saves
    compute and messages of dK/dV, but none of K/V.
    """

    def __init__(self, comm: Communicator, *, head_groups: int = 1, **options: Unpack[Options]) -> None:
        super().__init__(comm, partial(check_groups, head_groups), **options)
        self.head_groups = check_groups(head_groups)
        self.connect(self.comm)

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return one group, and two."""
        return [{}, {"head_groups": 2}]

    def plan(self, problem: Problem) -> None:
        """Cut the heads in groups, and make room for the K/V of two groups, of all ranks one after the other."""
        self.groups = problem.by_heads(min(self.head_groups, problem.kv_heads))
        self.owners = range(self.size)
        parts = [part for *_, part in self.groups]
        self.own = self.buffers.parcels("own kv", [part.kv(self.rank) for part in parts], buffers=2)
        self.kv = self.buffers.parcels(
            "kv", [[spec for o in self.owners for spec in part.kv(o)] for part in parts], buffers=2
        )
        # The blocks of this rank's queries that the mask leaves something of, and those of its keys.
        every = [(owner, problem.block(self.rank, owner)) for owner in self.owners]
        self.blocks = [(owner, block) for owner, block in every if block]
        self.users = [user for user in self.owners if problem.needed[user, self.rank]]

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to all K/V, some heads at a time."""
        out, lse = self.buffers.state(q)
        Waitall(self.gather(0, k, v))
        for step, (heads, *_) in enumerate(self.groups):
            requests = self.gather(step + 1, k, v)
            self.drop(heads)
            near_q, near_out, near_lse = q[:, heads], out[:, heads], lse[:, heads]
            for owner, block in self.blocks:
                near, progress = self.kv[step].arrays[2 * owner : 2 * owner + 2], partial(Testall, requests)
                self.kernel.forward(near_q, *near, block=block, out=near_out, lse=near_lse, progress=progress)
            Waitall(requests)
        return out, lse

    def gather(self, step: int, k: Array, v: Array) -> list[Request]:
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

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute what this rank adds to all dK/dV, some heads at a time, and take them home."""
        d_q, d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
        parts = [part for *_, part in self.groups]
        specs = [part.d_kv(owner) for part in parts for owner in self.owners]
        sums = self.buffers.parcels("d_kv", specs, buffers=2 * self.size)
        specs = [part.d_kv(self.rank) for part in parts for _ in range(self.size - 1)]
        arriving = self.buffers.parcels("arriving d_kv", specs, buffers=self.size - 1)
        Waitall(self.gather(0, k, v))
        requests: list[Request] = []
        shares: dict[int, Parcel] = {}
        totals = d_k, d_v
        for step, (heads, kv_heads, _) in enumerate(self.groups):
            requests += self.gather(step + 1, k, v)
            computed, arrived = sums[step * self.size :][: self.size], arriving[step * (self.size - 1) :]
            near_q, near_d_out, near_lse, near_delta, near_d_q = (a[:, heads] for a in (q, d_out, lse, delta, d_q))
            self.drop(heads)
            for owner, block in self.blocks:
                near, progress = self.kv[step].arrays[2 * owner : 2 * owner + 2], partial(Testall, requests)
                computed[owner].fill(0, 0)
                share_k, share_v = computed[owner].arrays
                self.kernel.backward(
                    near_q, *near, block=block, d_out=near_d_out, lse=near_lse, delta=near_delta, d_q=near_d_q,
                    d_k=share_k, d_v=share_v, progress=progress,
                )  # fmt: skip
            Waitall(requests)
            add_up(totals, shares)
            totals = d_k[:, kv_heads], d_v[:, kv_heads]
            by_rank = [*arrived[: self.rank], computed[self.rank], *arrived[self.rank :]]
            shares = {user: by_rank[user] for user in self.users}
            requests = exchange(self.comm, Tag.D_KV, {owner: computed[owner] for owner, _ in self.blocks}, shares)
        Waitall(requests)
        add_up(totals, shares)
        return d_q, d_k, d_v


def add_up(totals: tuple[Array, Array], shares: Mapping[int, Parcel]) -> None:
    """Add what the ranks have of some heads' dK/dV, in the order of the ranks."""
    for share in shares.values():
        for total, array in zip(totals, share.arrays, strict=True):
            operations(array).add(total, array)


def check_groups(head_groups: object) -> int:
    """Return the number of groups, or raise ValueError where that is none."""
    number = whole(head_groups)
    if number is None or number < 1:
        raise ValueError(f"head_groups is 1 or more, got {shown(head_groups)}")
    return number
