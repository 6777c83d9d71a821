"""Full attention on one device: everything goes to rank 0, is computed there, and comes back.

It is what the other algorithms are compared with: one rank computes, and holds the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array, Spec
from ..messages.message import Tag, Waitall
from ..messages.parcel import Parcel, nbytes
from ..problems.problem import Problem
from .base import Attention
from .shares import join

ROOT = 0


class DenseAttention(Attention):
    """Full attention on rank 0: it receives Q, K, V of the n-1 others and sends them their rows of the output.

    Parameters and errors: see `Attention`.
    """

    def plan(self, problem: Problem) -> None:
        """Number the ranks, and the positions of the whole sequences."""
        self.size, self.rank = self.comm.Get_size(), self.comm.Get_rank()
        self.served = range(self.size) if self.rank == ROOT else [self.rank]
        self.whole = np.arange(problem.q_tokens), np.arange(problem.kv_tokens)

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Compute everything on rank 0."""
        queries, keys = problem.q_positions, problem.kv_positions
        [inputs] = self.parcels("inputs", [problem.q(self.rank) + problem.kv(self.rank)])
        inputs.pack(q, k, v)
        arrived = self.to_root(inputs, [problem.q(rank) + problem.kv(rank) for rank in range(self.size)])
        results = self.parcels("results", [problem.o(rank) for rank in self.served])
        if self.rank == ROOT:
            whole_q, whole_k, whole_v = (
                join([part.arrays[i] for part in arrived], where) for i, where in enumerate((queries, keys, keys))
            )
            out, lse = self.state(problem, whole_q)
            self.kernel.forward(whole_q, whole_k, whole_v, *self.whole, out, lse)
            for rank, result in enumerate(results):
                result.pack(out[:, :, queries[rank]], lse[:, :, queries[rank]])
        out, lse = self.from_root(results).arrays
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute everything on rank 0."""
        queries, keys = problem.q_positions, problem.kv_positions
        specs = [problem.q_backward(rank) + problem.kv(rank) for rank in range(self.size)]
        [inputs] = self.parcels("inputs backward", [specs[self.rank]])
        inputs.pack(lse, row_delta, q, d_out, k, v)
        arrived = self.to_root(inputs, specs)
        sums = [problem.d_q(rank) + problem.d_kv(rank) for rank in self.served]
        results = self.parcels("results backward", sums)
        if self.rank == ROOT:
            places = (queries, queries, queries, queries, keys, keys)
            lse, row_delta, q, gradient, k, v = (
                join([part.arrays[i] for part in arrived], where) for i, where in enumerate(places)
            )
            d_q, d_k, d_v = (self.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
            self.kernel.backward(q, k, v, gradient, lse, row_delta, *self.whole, d_q, d_k, d_v)
            for rank, result in enumerate(results):
                result.pack(d_q[:, :, queries[rank]], d_k[:, :, keys[rank]], d_v[:, :, keys[rank]])
        d_q, d_k, d_v = self.from_root(results).arrays
        return d_q, d_k, d_v

    def to_root(self, own: Parcel, specs: Sequence[Sequence[Spec]]) -> list[Parcel]:
        """Send a parcel to rank 0; there, return everyone's."""
        if self.rank != ROOT:
            Waitall([self.comm.Isend(own.message, ROOT, Tag.GATHER)])
            return []
        arriving = [Parcel(group, self.xp.empty(nbytes(group), np.uint8)) for group in specs[1:]]
        Waitall([self.comm.Irecv(part.message, source, Tag.GATHER) for source, part in enumerate(arriving, 1)])
        return [own, *arriving]

    def from_root(self, results: Sequence[Parcel]) -> Parcel:
        """Return this rank's results: its only parcel, or the first of all ranks' on rank 0."""
        own = results[0]
        if self.rank != ROOT:
            Waitall([self.comm.Irecv(own.message, ROOT, Tag.SCATTER)])
        else:
            Waitall([self.comm.Isend(results[rank].message, rank, Tag.SCATTER) for rank in range(1, self.size)])
        return own
