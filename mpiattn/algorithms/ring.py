"""Ring Attention (arXiv 2310.01889): queries stay, K/V go once around a ring of ranks.

    step 0      step 1      step 2            rank r attends its queries to the K/V of owner r - step,
  0: kv 0     0: kv 2     0: kv 1             while these travel on to rank r + 1 and the next ones
  1: kv 1     1: kv 0     1: kv 2             arrive from rank r - 1
  2: kv 2     2: kv 1     2: kv 0

Backward, K/V go around again. The partial dK/dV follow one step behind them: each rank adds its part, and the last
one that does sends the sum home. With 3 ranks, rank 0:

    step   arrives        computes                leaves for rank 1   leaves for home
    0      kv 2           own block, first half   kv 0
    1      kv 1           block of kv 2           kv 2
    2      dkv 1          block of kv 1           dkv 2
    3      dkv 0, home    own block, second half                      dkv 1, to rank 1

Below, hop h means the K/V that are here at step h: they have made h hops, from the h-th rank before this one. A mask
shortens ways: `ways[h].reaches(h)` says that these K/V make hop h, as a rank there or beyond uses them; `summed(h)`
that this rank sends a sum of their dK/dV, `joined(h)` that a sum of the ranks before arrives for it to add to, and
`ends(h)` that this rank is the last to do so and sends it home. `ways[0].leaves`: this rank's own K/V go anywhere.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..arrays import Array
from ..messages.message import Communicator, Request, Tag, Testall, Waitall
from ..messages.parcel import Parcel
from ..problems.problem import Problem
from .base import Attention
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RingAttention(Attention):
    """Ring Attention: n-1 messages of K/V forward; n-1 of K/V and n-1 of dK/dV backward.

    A chunk travels as far as its last user: a mask that empties the blocks beyond ends its way there.
    Parameters and errors: see `Attention`.
    """

    def __init__(self, comm: Communicator, **options: Unpack[Options]) -> None:
        super().__init__(comm, **options)
        self.connect(self.comm)

    def connect(self, comm: Communicator) -> None:
        """Make the ring."""
        self.ring = comm.Create_cart([comm.Get_size()], periods=[True], reorder=False)
        self.size, self.rank = self.ring.Get_size(), self.ring.Get_rank()
        self.source, self.dest = self.ring.Shift(0, 1)

    def plan(self, problem: Problem) -> None:
        """Say for each hop whose K/V are here, how far they travel, and which block is computed with them.

        Two buffers of K/V take turns: one is computed with while the other receives. On GPUs there is a third.
        """
        owners = [self.owner(hop) for hop in range(self.size)]
        self.ways = [problem.ways[owner] for owner in owners]
        self.kv = self.buffers.parcels("kv", [problem.kv(owner) for owner in owners], buffers=2, anew=True)
        self.blocks = [problem.block(self.rank, owner) for owner in owners]  # None where the mask empties it
        self.backward_blocks = [*self.blocks, None]  # there is one step more
        if self.size > 1 and self.ways[0].ends(self.size - 1):
            # This rank's sum comes home in the last step: half of its own block is left for that time.
            halves = (problem.block(self.rank, self.rank, rows) for rows in problem.halves(self.rank))
            self.backward_blocks[0], self.backward_blocks[self.size] = halves

    def owner(self, hop: int) -> int:
        """Return the rank whose K/V are here at step hop."""
        return (self.rank - hop) % self.size

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to one owner's K/V a step."""
        out, lse = self.buffers.unwritten_state(q)  # (batch, heads, tokens, v_head_dim), (batch, heads, tokens)
        self.kernel.begin(out, lse)
        if self.ways[0].leaves:
            self.kv[0].pack(k, v)
        for step, block in enumerate(self.blocks):
            posted = self.pass_kv(step)  # under way while the block is computed
            if block:
                near = self.kv[step].arrays if step else (k, v)
                progress = partial(Testall, posted)
                self.kernel.forward(q, *near, block=block, out=out, lse=lse, progress=progress)
            Waitall(posted)
        out, lse = self.kernel.complete((out, lse))
        return out, lse

    def pass_kv(self, step: int) -> list[Request]:
        """Post hop step + 1 of the K/V: the next ones arrive, those that are here leave."""
        hop, posted = step + 1, []
        if hop < self.size and self.ways[hop].reaches(hop):
            posted.append(self.ring.Irecv(self.kv[hop].message, self.source, Tag.KV))
        if step < self.size and self.ways[step].reaches(hop):
            posted.append(self.ring.Isend(self.kv[step].message, self.dest, Tag.KV))
        return posted

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Add to one owner's dK/dV a step."""
        [d_q] = self.buffers.parcels("d_q", [problem.d_q(self.rank)])[0].arrays  # (batch, heads, tokens, head_dim)
        specs = [problem.d_kv(self.owner(hop)) for hop in range(self.size)]
        [own] = self.buffers.parcels("own d_kv", specs[:1])  # (batch, kv_heads, tokens, head_dim and v_head_dim)
        # By hop: this rank's part, and the place where the sum of the ranks before it arrives.
        sums = [own, *self.buffers.sums("d_kv", specs, buffers=2, anew=True)[1:]]
        arriving = self.buffers.arriving("d_kv", specs)
        self.kernel.begin(d_q)
        if self.ways[0].leaves:
            self.kv[0].pack(k, v)
        for step, block in enumerate(self.backward_blocks):
            hop = step if step < self.size else 0  # in the last step this rank's own block again
            posted = self.pass_kv(step) + self.pass_sums(step, sums, arriving)
            if step < self.size:
                self.kernel.begin(*sums[step].arrays)  # its buffer held the sum of hop step - 2, which has left
            if block:
                near, (d_k, d_v) = self.kv[hop].arrays if hop else (k, v), sums[hop].arrays
                progress = partial(Testall, posted)
                self.kernel.backward(
                    q, *near, block=block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v,
                    progress=progress,
                )  # fmt: skip
            Waitall(posted)
        home = [arriving[0].arrays] if self.ways[0].leaves else []
        d_k, d_v = self.kernel.complete(own.arrays, *home)
        [d_q] = self.kernel.complete([d_q])
        return d_q, d_k, d_v

    def pass_sums(self, step: int, sums: list[Parcel], arriving: list[Parcel]) -> list[Request]:
        """Post the dK/dV, one step behind the K/V: the sum of hop step - 1 leaves, the one of hop step arrives."""
        hop, posted = step - 1, []
        if step > 0 and self.ways[hop].summed(hop):
            # This rank's part was computed while the sum of the ranks before arrived: now they are added.
            self.kernel.settle(sums[hop], *([arriving[hop].arrays] if self.ways[hop].joined(hop) else []))
            dest = self.owner(hop) if self.ways[hop].ends(hop) else self.dest  # home, or on
            posted.append(self.ring.Isend(sums[hop].message, dest, Tag.D_KV))
        if step < self.size and self.ways[step].joined(step):
            posted.append(self.ring.Irecv(arriving[step].message, self.source, Tag.D_KV))
        if hop > 0 and self.ways[0].ends(hop):  # the last user of this rank's K/V, hop ranks on, sends their sum now
            posted.append(self.ring.Irecv(arriving[0].message, (self.rank + hop) % self.size, Tag.D_KV))
        return posted
