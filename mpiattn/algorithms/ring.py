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

from ..message import Communicator, Tag, Testall, Waitall
from ..problem import Problem, travels
from .base import Array, Attention, Options

if TYPE_CHECKING:
    from .base import Unpack


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
        """Say whose K/V are here at each step, and how far each chunk travels."""
        self.owners = [(self.rank - step) % self.size for step in range(self.size)]
        self.travels = travels(problem.needed.T)
        # Two buffers take turns: a step's K/V are in one while those of the next arrive in the other.
        self.kv = self.parcels("kv", [problem.kv(owner) for owner in self.owners], buffers=2, anew=True)
        # Backward, half of the own block's work is left for the last step, while the own sum comes home.
        first, last = (slice(None), problem.q_positions[self.rank]), (slice(0), problem.q_positions[self.rank][:0])
        if self.travels[self.rank].last == self.size - 1 > 0:
            first, last = problem.halves(self.rank)
        self.parts = {0: first, self.size: last}

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to one owner's K/V a step."""
        out, lse = self.state(problem, q)
        self.kernel.begin(out, lse)
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
        if step + 1 < self.size and step < self.travels[self.owners[step + 1]].last:
            requests.append(self.ring.Irecv(self.kv[step + 1].message, self.source, Tag.KV))
        if step < self.travels[self.owners[step]].last:
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
        users = self.travels[self.rank]
        self.kernel.begin(*d_q.arrays)
        self.kv[0].pack(k, v)
        for step in range(self.size + 1):
            requests = self.pass_kv(step) if step < self.size else []
            owner, sent = self.owners[step % self.size], self.owners[step - 1]
            travel = self.travels[sent]
            if travel.first <= step - 1 <= travel.last:
                # A step's share was computed while the sum of the ranks before arrived: now they are added.
                self.kernel.settle(
                    d_kv[step - 1], *[p.arrays for p in arriving[step - 1 : step] if travel.first < step - 1]
                )
                dest = self.dest if step - 1 < travel.last else sent
                requests.append(self.ring.Isend(d_kv[step - 1].message, dest, Tag.D_KV))
            if step < self.size:
                if self.travels[owner].first <= step - 1 < self.travels[owner].last:
                    requests.append(self.ring.Irecv(arriving[step].message, self.source, Tag.D_KV))
                self.kernel.begin(*d_kv[step].arrays)
            if users.last == step - 1 > 0:
                last = (self.rank + users.last) % self.size
                requests.append(self.ring.Irecv(arriving[0].message, last, Tag.D_KV))
            part, positions = self.parts.get(step, (slice(None), problem.q_positions[self.rank]))
            if problem.needed[self.rank, owner] and len(positions):
                near = self.kv[step].arrays if owner != self.rank else [k, v]
                rows = [array[:, :, part] for array in (d_out, lse, row_delta)]
                where, totals = (positions, problem.kv_positions[owner]), d_kv[step % self.size].arrays
                progress = partial(Testall, requests)
                self.kernel.backward(q[:, :, part], *near, *rows, *where, d_q.arrays[0][:, :, part], *totals, progress)
            Waitall(requests)
        d_k, d_v = self.kernel.complete(own.arrays, *[home.arrays for home in arriving[:1] if users.last > 0])
        return self.kernel.complete(d_q.arrays)[0], d_k, d_v

    def free(self) -> None:
        """Free the ring's communicator."""
        self.ring.Free()
