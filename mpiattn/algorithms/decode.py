"""Decoding: a few new tokens attend to a K/V cache that is spread over the ranks.

Every rank has the new queries and its shard of the cache. It attends to its shard; what is left is to combine
the partial (out, lse) of all ranks, on all ranks. Either by all-reduces (Tree Attention, arXiv 2408.04093), of
plain messages that are added up in the order of the ranks, see `reduction.py`:

    top = max of lse        sums = sum of exp(lse - top) (out, 1)        out = sums / the last of them

or by a tree of messages, a merge at each arrow, and the same tree back:

    0 <- 1    2 <- 3    4 <- 5    6          0 -> 4
    0 <------ 2         4 <------ 6          0 -> 2    4 -> 6
    0 <---------------- 4                    0 -> 1    2 -> 3    4 -> 5

or by an all-to-all of heads (Helix, arXiv 2507.07120), which leaves each rank the result of its share of the heads,
as an output projection that is cut by heads wants it:

    rank 0:  (out, lse) of heads 0 1 2          head 0, merged from 0 1 2
    rank 1:  (out, lse) of heads 0 1 2    ->    head 1, merged from 0 1 2
    rank 2:  (out, lse) of heads 0 1 2          head 2, merged from 0 1 2

Backward, each rank has all it needs for dK, dV of its shard, after the all-to-all once the others' heads of dO have
come; dQ is summed up, in the same way or by an all-reduce.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import DESCRIPTION, Array, Spec
from ..arrays.softmax import merge, normalised, weighted
from ..errors import InputError
from ..messages.message import Communicator, Tag, Waitall
from ..messages.parcel import Parcel
from ..messages.reduction import all_reduce, exchange, maximum
from ..problems.block import Block
from ..problems.kv_cache import CacheProblem, heads_of, posed_to_cache, some_heads, span
from ..problems.mask import Mask, Positions
from ..problems.problem import Problem
from ..problems.scalars import check_name
from .base import Attention
from .given import Given, agreed_given, checksum, numbered
from .options import Options
from .posed import described, fit_together
from .saved import Saved, fingerprint
from .shares import Where

if TYPE_CHECKING:
    from typing_extensions import Unpack

COMBINE = ("allreduce", "tree", "alltoall")


class DecodeAttention(Attention):
    """Attention of new tokens, the same on every rank, to a sharded cache; the result is the same on every rank.

    Parameters
    ----------
    comm, options
        See `Attention`; the layout is the cache's, contiguous by default.
    combine : {"allreduce", "tree", "alltoall"}
        Two all-reduces, which spread the bytes and the sums over the ranks; or a tree there and back, which does
        with fewer messages and, going there, leaves out the ranks that the mask or an empty shard leaves nothing to
        say; or an all-to-all, which leaves these out too, receives half of the all-reduces' bytes forward and half as
        many again backward, and returns the
        out and lse of this rank's heads alone, `heads_of`. The bits of the result are the same with every MPI library.

    Notes
    -----
    q holds the same numbers on every rank, and so does d_out, where it has all heads. The queries are the last tokens
    of the sequence, so their own keys are in the cache already: append first, then attend.

    A contiguous cache has its tokens in rank order, in shards of any lengths. In another layout the lengths are
    the layout's. Where a cache has grown out of any, `forward` is given the positions of each shard's tokens.
    """

    copied = frozenset({"q", "out"})

    def __init__(self, comm: Communicator, *, combine: str = "allreduce", **options: Unpack[Options]) -> None:
        options["layout"] = options.get("layout") or "contiguous"
        super().__init__(comm, partial(check, combine), **options)
        self.combine, self.last = combine, outline()
        if combine == "alltoall":
            self.copied = frozenset({"q"})
        self.connect(self.comm)

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return all ways to combine."""
        return [{"combine": combine} for combine in COMBINE]

    def owned(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Where:
        """Return where a rank's share lies: all queries, its shard of the cache; see `Attention.owned`."""
        if name == "out" and self.combine == "alltoall":
            return lambda shape, rank: (slice(None), heads_of(shapes["q"][1], self.size, rank))
        return super().owned(name, shapes) if name in "kv" else lambda shape, rank: (slice(None),)

    @property
    def identity(self) -> tuple[object, ...]:
        """Settings that must be the same in `forward` and in the `backward` that uses its result."""
        return *super().identity, self.combine == "alltoall"

    def forward(
        self, q: Array, k: Array, v: Array, kv_positions: Positions | None = None, **given: Unpack[Given]
    ) -> tuple[Array, Saved]:
        """Attend to the cache; as `Attention.forward`, with q for all ranks and their shards as k, v.

        Parameters
        ----------
        kv_positions : int64, (key tokens,), optional
            Global positions of this rank's keys, ascending; on every rank or on none.
        """
        self.given = kv_positions
        result = super().forward(q, k, v, **given)
        self.last = outline(q, k, v)
        return result

    def again(self, q: Array, k: Array, v: Array) -> Array:
        """Return the out of arrays that are, on every rank, of the shapes and dtypes that `forward` was given last.

        For another block of a model, without `backward` and sinks: the ranks need not agree anew, which takes as long
        as a new token's attention itself.

        Raises
        ------
        InputError
            On the rank whose arrays are others, where all ranks must call `forward`.
        """
        self.usable()
        if self.problem is None or self.sinks is not None or outline(q, k, v) != self.last:
            raise InputError("again takes arrays of the shapes and dtypes that forward was given last, without sinks")
        with self.running("forward"):
            out, _ = self.attend(self.problem, q, k, v)
            return self.rounded(out)

    def pose(self, q: Array, k: Array, v: Array, given: Given) -> Problem:
        """Return the problem that all ranks' arrays pose, which agree on what they are given beside them."""
        shard = _, sound, _, _ = span(self.given, getattr(k, "shape", ()))
        table = self.agreement.arrays([*shard, checksum(q), *numbered(q, given)], q=q, k=k, v=v)
        end = 3 * DESCRIPTION  # of the descriptions of q, k and v
        descriptions, spans, others = table[:, :end], table[:, end : end + len(shard)], table[:, end + len(shard) :]
        own = self.given.tobytes() if self.given is not None and sound else None
        problem = _posed(descriptions.tobytes(), tuple(map(tuple, spans.tolist())), own, self.layout, self.mask)
        for rank in np.flatnonzero(others[:, 0] != others[0, 0]):
            raise InputError(f"q on rank {rank} holds other numbers than on rank 0: all ranks take the same queries")
        agreed_given(others[:, 1:].tolist())
        return problem

    def fingerprint(self, q: Array, k: Array, v: Array, *results: Array | None) -> int:
        """Return a number without k and v: reading the whole cache for each token takes as long as attention."""
        return fingerprint(q, *results)

    def plan(self, problem: Problem) -> None:
        """Say who is below this rank in the tree, who has anything to say, and who has which heads."""
        assert isinstance(problem, CacheProblem)
        self.heads = [heads_of(problem.heads, self.size, rank) for rank in range(self.size)]
        self.sees = problem.sees
        queries, keys = problem.q_positions[self.rank], problem.keys(self.rank)
        self.block = Block(problem.mask, queries, keys) if self.sees[self.rank] else None
        self.up = self.rank & -self.rank  # how far away is the rank above: 1, 2, 4, ...; 0 for rank 0, which has none
        self.below = [
            step for step in steps(self.size) if (step < self.up or not self.up) and self.rank + step < self.size
        ]

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to this rank's shard, and combine."""
        [own] = self.buffers.parcels("o", [problem.o(self.rank)])
        own.fill(0, -math.inf)
        out, lse = own.arrays
        if self.block:
            self.kernel.forward(q, k, v, block=self.block, out=out, lse=lse)
        if self.size == 1:
            return out, lse
        if self.combine == "tree":
            self.tree(own, Tag.O, lambda total, share: merge(*total.arrays, *share.arrays))
            return out, lse
        if self.combine == "alltoall":
            return self.to_heads(problem, out, lse)
        top = lse.copy()
        all_reduce(self.comm, top, maximum)
        sums = weighted(out, lse, top)
        all_reduce(self.comm, sums)
        return normalised(sums, top)

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Compute dK, dV of this rank's shard, and what it adds to dQ; sum that up."""
        [own] = self.buffers.parcels("d_q", [problem.d_q(self.rank)])
        own.fill(0)
        [d_q] = own.arrays
        d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (k, v))
        if self.combine == "alltoall":
            lse, delta, d_out = self.of_all_heads(problem, lse, delta, d_out)
        if self.block:
            self.kernel.backward(
                q, k, v, block=self.block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )
        if self.combine == "tree":
            self.tree(own, Tag.D_Q, Parcel.add)
        else:
            all_reduce(self.comm, d_q)
        return d_q, d_k, d_v

    def to_heads(self, problem: Problem, out: Array, lse: Array) -> tuple[Array, Array]:
        """Send each rank its heads of this rank's part; return this rank's heads, merged in the order of the ranks."""
        ranks, whole = range(self.size), problem.o(self.rank)
        leaving = self.buffers.parcels("leaving O", [some_heads(whole, heads) for heads in self.heads])
        arriving = self.buffers.parcels("arriving O", [leaving[self.rank].specs for _ in ranks])
        arriving[self.rank] = leaving[self.rank]
        for parcel, heads in zip(leaving, self.heads, strict=True):
            parcel.pack(out[:, heads], lse[:, heads])
        to = dict(enumerate(leaving)) if self.sees[self.rank] else {}
        Waitall(exchange(self.comm, Tag.O, to, {rank: arriving[rank] for rank in ranks if self.sees[rank]}))
        total = arriving[self.rank]
        for rank in ranks:
            if rank != self.rank and self.sees[rank]:
                merge(*total.arrays, *arriving[rank].arrays)
        out, lse = total.arrays
        return out, lse

    def of_all_heads(self, problem: Problem, *rows: Array) -> list[Array]:
        """Return rows of all heads, where this rank has anything to compute of them: an all-gather of each rank's."""
        ranks, whole = range(self.size), problem.d_out(self.rank)
        parcels = self.buffers.parcels("d_out", [some_heads(whole, heads) for heads in self.heads])
        parcels[self.rank].pack(*rows)
        to = {rank: parcels[self.rank] for rank in ranks if self.sees[rank]}
        Waitall(exchange(self.comm, Tag.D_O, to, dict(enumerate(parcels)) if self.sees[self.rank] else {}))
        [total] = self.buffers.parcels("whole d_out", [whole])
        for parcel, heads in zip(parcels, self.heads, strict=True):
            for place, part in zip(total.arrays, parcel.arrays, strict=True):
                place[:, heads] = part
        return total.arrays

    def finish(self, q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Array, Saved]:
        """Return what `forward` returns; sinks are of the heads of out."""
        if self.sinks is not None and self.combine == "alltoall":
            self.sinks = self.sinks[self.heads[self.rank]]
        return super().finish(q, k, v, out, lse)

    def tree(self, own: Parcel, tag: Tag, combine: Callable[[Parcel, Parcel], None]) -> None:
        """Combine the parcels of all ranks on rank 0, up the tree, and send the result back down to all."""
        [share] = self.buffers.parcels(f"arriving {tag.name}", [own.specs])
        for step in self.below:
            if any(self.sees[self.rank + step :][:step]):
                Waitall([self.comm.Irecv(share.message, self.rank + step, tag)])
                combine(own, share)
        if self.up:
            if any(self.sees[self.rank :][: self.up]):
                Waitall([self.comm.Isend(own.message, self.rank - self.up, tag)])
            Waitall([self.comm.Irecv(own.message, self.rank - self.up, tag)])
        Waitall([self.comm.Isend(own.message, self.rank + step, tag) for step in reversed(self.below)])


@functools.lru_cache(maxsize=4)
def _posed(
    descriptions: bytes, spans: tuple[tuple[int, ...], ...], own: bytes | None, layout: str, mask: Mask
) -> CacheProblem:
    """Return the problem that all ranks' q, k, v and positions pose: the same one in each block of a model."""
    specs = described(descriptions, len(spans), 3)
    fit_together(specs)
    return posed_to_cache(specs, spans, own, layout, mask)


def steps(size: int) -> list[int]:
    """Return 1, 2, 4, ... below the number of ranks."""
    return [2**level for level in range((size - 1).bit_length())]


def outline(*arrays: Array) -> list[Spec]:
    """Return the shapes and dtypes of arrays."""
    return [(array.shape, array.dtype) for array in arrays]


def check(combine: str) -> None:
    """Raise ValueError where that is no way to combine."""
    check_name("combine", combine, COMBINE)
