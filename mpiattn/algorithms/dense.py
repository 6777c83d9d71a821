"""Full attention on one device: everything goes to rank 0, is computed there, and comes back.

It is what the other algorithms are compared with: one rank computes, and holds the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Spec
from ..arrays.operations import take
from ..arrays.places import Places
from ..messages.message import Communicator, Tag, Waitall
from ..messages.parcel import Parcel, nbytes
from ..problems.block import Block
from ..problems.problem import Problem
from .base import Attention
from .options import Options
from .shares import join

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROOT = 0


class DenseAttention(Attention):
    """Full attention on rank 0: it receives Q, K, V of the n-1 others and sends them their rows of the output.

    Parameters and errors: see `Attention`.
    """

    def __init__(self, comm: Communicator, **options: Unpack[Options]) -> None:
        super().__init__(comm, **options)
        self.connect(self.comm)

    def plan(self, problem: Problem) -> None:
        """Say whom this rank serves, and make the block of the whole sequences."""
        self.served = range(self.size) if self.rank == ROOT else [self.rank]
        self.queries, self.keys = (
            [Places(chunk) for chunk in chunks] for chunks in (problem.q_positions, problem.kv_positions)
        )
        self.whole = Block(problem.mask, np.arange(problem.q_tokens), np.arange(problem.kv_tokens))

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Compute everything on rank 0."""
        [inputs] = self.buffers.parcels("inputs", [problem.q(self.rank) + problem.kv(self.rank)])
        inputs.pack(q, k, v)
        arrived = self.to_root(inputs, [problem.q(rank) + problem.kv(rank) for rank in range(self.size)])
        results = self.buffers.parcels("results", [problem.o(rank) for rank in self.served])
        if self.rank == ROOT:
            whole_q, whole_k, whole_v = (
                join([part.arrays[i] for part in arrived], where)
                for i, where in enumerate((self.queries, self.keys, self.keys))
            )
            out, lse = self.buffers.state(whole_q)
            self.kernel.forward(whole_q, whole_k, whole_v, block=self.whole, out=out, lse=lse)
            for rank, result in enumerate(results):
                result.pack(take(out, self.queries[rank]), take(lse, self.queries[rank]))
        out, lse = self.from_root(results).arrays
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute everything on rank 0."""
        specs = [problem.q_backward(rank) + problem.kv(rank) for rank in range(self.size)]
        [inputs] = self.buffers.parcels("inputs backward", [specs[self.rank]])
        inputs.pack(lse, delta, q, d_out, k, v)
        arrived = self.to_root(inputs, specs)
        sums = [problem.d_q(rank) + problem.d_kv(rank) for rank in self.served]
        results = self.buffers.parcels("results backward", sums)
        if self.rank == ROOT:
            places = (*[self.queries] * 4, self.keys, self.keys)
            lse, delta, q, gradient, k, v = (
                join([part.arrays[i] for part in arrived], where) for i, where in enumerate(places)
            )
            d_q, d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
            self.kernel.backward(
                q, k, v, block=self.whole, d_out=gradient, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )
            for rank, result in enumerate(results):
                queries, keys = self.queries[rank], self.keys[rank]
                result.pack(take(d_q, queries), take(d_k, keys), take(d_v, keys))
        d_q, d_k, d_v = self.from_root(results).arrays
        return d_q, d_k, d_v

    def to_root(self, own: Parcel, specs: Sequence[Sequence[Spec]]) -> list[Parcel]:
        """Send a parcel to rank 0; there, return everyone's."""
        if self.rank != ROOT:
            Waitall([self.comm.Isend(own.message, ROOT, Tag.GATHER)])
            return []
        arriving = [Parcel(group, self.buffers.xp.empty(nbytes(group), np.uint8)) for group in specs[1:]]
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
