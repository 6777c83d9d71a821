"""Ring Attention (arXiv 2310.01889): queries stay, K/V go once around a ring of ranks.

    step 0      step 1      step 2            rank r attends its queries to the K/V of owner r - step,
  0: kv 0     0: kv 2     0: kv 1             while these travel on to rank r + 1 and the next ones
  1: kv 1     1: kv 0     1: kv 2             arrive from rank r - 1
  2: kv 2     2: kv 1     2: kv 0

Backward, K/V go around again, and behind them, one step later, the partial dK/dV that each rank adds
to; the last one that adds sends them home. A rank's own block is computed in two parts: while the first
K/V arrive, and while its own dK/dV come home.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array
from ..messages.message import Communicator, Tag, Testall, Waitall
from ..messages.parcel import Parcel
from ..problems.problem import Problem
from ..problems.travel import travels
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
        self.ring = comm.Create_cart([comm.Get_size()], periods=[True], reorder=False)
        self.size, self.rank = self.ring.Get_size(), self.ring.Get_rank()
        self.source, self.dest = self.ring.Shift(0, 1)

    def plan(self, problem: Problem) -> None:
        """Say whose K/V are here at each step, and to which hops their users are."""
        self.owners = [(self.rank - step) % self.size for step in range(self.size)]
        ways = travels(problem.needed.T)
        self.first, self.last = ([getattr(ways[o], end) for o in self.owners] for end in ("first", "last"))
        # Two buffers take turns: a step's K/V are in one while those of the next arrive in the other.
        self.kv = self.parcels("kv", [problem.kv(owner) for owner in self.owners], buffers=2, anew=True)
        # Backward, half of the own block's work is left for the last step, while the own sum comes home.
        own = problem.q_positions[self.rank]
        self.whole, nothing = (None, own), (slice(0), own[:0])
        halves = problem.halves(self.rank) if self.last[0] == self.size - 1 > 0 else [self.whole, nothing]
        self.parts = {0: halves[0], self.size: halves[1]}

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to one owner's K/V a step."""
        out, lse = self.state(problem, q)
        self.kernel.begin(out, lse)
        if self.last[0]:
            self.kv[0].pack(k, v)
        for step, owner in enumerate(self.owners):
            requests = self.pass_kv(step)
            if problem.needed[self.rank, owner]:
                where = problem.q_positions[self.rank], problem.kv_positions[owner]
                near_k, near_v = self.kv[step].arrays if step else (k, v)
                self.kernel.forward(q, near_k, near_v, *where, out, lse, partial(Testall, requests))
            Waitall(requests)
        out, lse = self.kernel.complete((out, lse))
        return out, lse

    def pass_kv(self, step: int) -> list[Any]:
        """Post the messages that bring the K/V of the next step, and pass this step's on."""
        requests = []
        if step + 1 < self.size and step < self.last[step + 1]:
            requests.append(self.ring.Irecv(self.kv[step + 1].message, self.source, Tag.KV))
        if step < self.size and step < self.last[step]:
            requests.append(self.ring.Isend(self.kv[step].message, self.dest, Tag.KV))
        return requests

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Add to one owner's dK/dV a step."""
        [d_q] = self.parcels("d_q", [problem.d_q(self.rank)])
        specs = [problem.d_kv(owner) for owner in self.owners]
        [own], d_kv = self.parcels("own d_kv", specs[:1]), self.sums("d_kv", specs, buffers=2, anew=True)
        d_kv[0], arriving = own, self.arriving("d_kv", specs)
        self.kernel.begin(*d_q.arrays)
        if self.last[0]:
            self.kv[0].pack(k, v)
        for step in range(self.size + 1):
            requests = self.pass_kv(step) + self.pass_sums(step, d_kv, arriving)
            here, owner = step % self.size, self.owners[step % self.size]
            if step < self.size:
                self.kernel.begin(*d_kv[step].arrays)
            part, positions = self.parts.get(step, self.whole)
            if problem.needed[self.rank, owner] and len(positions):
                rows, near = [q, d_out, lse, row_delta, *d_q.arrays], self.kv[step].arrays if here else [k, v]
                near_q, *rows, total = rows if part is None else [array[:, :, part] for array in rows]
                where, sums = (positions, problem.kv_positions[owner]), d_kv[here].arrays
                self.kernel.backward(near_q, *near, *rows, *where, total, *sums, partial(Testall, requests))
            Waitall(requests)
        d_k, d_v = self.kernel.complete(own.arrays, *[home.arrays for home in arriving[:1] if self.last[0] > 0])
        return self.kernel.complete(d_q.arrays)[0], d_k, d_v

    def pass_sums(self, step: int, d_kv: list[Parcel], arriving: list[Parcel]) -> list[Any]:
        """Post the messages of the sums, which follow K/V one step behind; the last user of K/V sends them home."""
        requests, before = [], step - 1
        if self.first[before] <= before <= self.last[before]:
            # The own share was computed while the sum of the ranks before arrived: now they are added.
            self.kernel.settle(d_kv[before], *([arriving[before].arrays] if self.first[before] < before else []))
            dest = self.dest if before < self.last[before] else self.owners[before]
            requests.append(self.ring.Isend(d_kv[before].message, dest, Tag.D_KV))
        if step < self.size and self.first[step] <= before < self.last[step]:
            requests.append(self.ring.Irecv(arriving[step].message, self.source, Tag.D_KV))
        if self.last[0] == before > 0:
            requests.append(self.ring.Irecv(arriving[0].message, (self.rank + before) % self.size, Tag.D_KV))
        return requests

    def free(self) -> None:
        """Free the ring's communicator."""
        self.ring.Free()
