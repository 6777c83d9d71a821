"""DeepSpeed-Ulysses (arXiv 2309.14509): ranks that share out the tokens share out the heads instead, for a while.

With 3 ranks and 3 heads:

             tokens   heads                   tokens   heads                   tokens   heads
    rank 0:  a        0 1 2    all-to-all ->  a b c    0        all-to-all ->  a        0 1 2
    rank 1:  b        0 1 2                   a b c    1                       b        0 1 2
    rank 2:  c        0 1 2                   a b c    2                       c        0 1 2

Q, K, V go to the heads, out comes back to the tokens; backward, dO goes, and dQ, dK, dV come back.
`layout.heads` says which heads a rank has, for any number of them. Where K/V heads are fewer than ranks,
those that share one are sent the same, and the owner of the tokens adds up their partial dK/dV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..arrays import Array, Spec
from ..arrays.operations import take
from ..arrays.softmax import delta as row_sums
from ..messages.message import Communicator, Tag, Waitall
from ..messages.parcel import Parcel
from ..problems.block import Block
from ..problems.problem import Problem
from .base import Attention
from .given import Given
from .options import Check, Options
from .saved import Saved
from .shares import join

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UlyssesAttention(Attention):
    """DeepSpeed-Ulysses: two all-to-alls forward and two backward, each one message from each other rank.

    Every head needs all tokens, so a mask saves compute but no messages. Ranks without a head, where ranks
    outnumber heads, compute nothing. `saved` has all tokens of this rank's heads, as in the paper: n times
    the tokens and one n-th of the heads, so that backward doesn't send Q, K, V again.
    Parameters and errors: see `Attention`.
    """

    def __init__(self, comm: Communicator, *own: Check, **options: Unpack[Options]) -> None:
        super().__init__(comm, *own, **options)
        self.connect(self.comm)

    def connect(self, comm: Communicator) -> None:
        """Exchange among all ranks."""
        self.group, self.members = comm, list(range(comm.Get_size()))

    def plan(self, problem: Problem) -> None:
        """Say which heads each rank of the group has, and where its tokens lie among the whole group's."""
        self.place = self.group.Get_rank()
        self.rank = self.members[self.place]
        shares = problem.by_heads(len(self.members))
        self.heads = [(heads, kv_heads) for heads, kv_heads, _ in shares]
        self.parts = [part for *_, part in shares]
        self.part = self.parts[self.place]
        self.first_head = self.heads[self.place][0].start
        self.partial = sum(part.kv_heads for part in self.parts) > problem.kv_heads
        queries, self.q_places = problem.queries_of(self.members)
        keys, self.kv_places = problem.keys_of(self.members)
        self.block = Block(problem.mask, queries, keys)

    def forward(self, q: Array, k: Array, v: Array, **given: Unpack[Given]) -> tuple[Array, Saved]:
        """Exchange tokens for heads, attend, exchange back. Shapes, dtypes, errors: see `Attention.forward`."""
        problem = self.agree_forward(q, k, v, **given)
        with self.running("forward"):
            leaving: Contents = [(q[:, heads], k[:, kv_heads], v[:, kv_heads]) for heads, kv_heads in self.heads]
            arrived = self.to_heads(Tag.QKV, Problem.qkv, leaving)
            q, k, v = (
                join([parcel.arrays[i] for parcel in arrived], places)
                for i, places in enumerate((self.q_places, self.kv_places, self.kv_places))
            )
            out, lse = self.attend(self.part, q, k, v)
            [state] = self.buffers.parcels("o", [problem.o(self.rank)])
            leaving = ((take(array, at) for array in (lse, out)) for at in self.q_places)
            arrived = self.to_tokens(Tag.O, Problem.out, leaving)
            out, lse = state.arrays
            for (heads, _), parcel in zip(self.heads, arrived, strict=True):
                lse[:, heads], out[:, heads] = parcel.arrays
            return self.finish(q, k, v, out, lse)

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Return out and lse of all the group's tokens, of this rank's heads."""
        out, lse = self.buffers.state(q)
        if problem.heads:
            self.kernel.forward(q, k, v, block=self.block, out=out, lse=lse)
        return out, lse

    def backward(self, d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """Exchange as forward, with gradients. Shapes, dtypes, errors: see `Attention.backward`."""
        problem = self.agree_backward(d_out, saved)
        with self.running("backward"):
            rows = saved.lse, row_sums(d_out, saved.out), d_out
            arrived = self.to_heads(
                Tag.D_O, Problem.d_out, [[row[:, heads] for row in rows] for heads, _ in self.heads]
            )
            lse, delta, gradient = (join([parcel.arrays[i] for parcel in arrived], self.q_places) for i in range(3))
            d_q, d_k, d_v = self.gradients(self.part, saved.q, saved.k, saved.v, gradient, lse, delta)
            [total] = self.buffers.parcels("d_qkv", [problem.d_kv(self.rank) + problem.d_q(self.rank)])
            total.fill(0, 0, 0)
            leaving = (
                (take(array, at) for array, at in ((d_k, keys), (d_v, keys), (d_q, queries)))
                for keys, queries in zip(self.kv_places, self.q_places, strict=True)
            )
            arrived = self.to_tokens(Tag.D_QKV, lambda part, rank: part.d_qkv(rank, self.partial), leaving)
            d_k, d_v, d_q = total.arrays
            for (heads, kv_heads), parcel in zip(self.heads, arrived, strict=True):
                part_k, part_v, d_q[:, heads] = parcel.arrays
                d_k[:, kv_heads] += part_k
                d_v[:, kv_heads] += part_v
            return self.rounded(d_q), self.rounded(d_k), self.rounded(d_v)

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Return dQ, dK, dV of all the group's tokens, of this rank's heads."""
        d_q, d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
        if problem.heads:
            self.kernel.backward(
                q, k, v, block=self.block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )
        return d_q, d_k, d_v

    def to_heads(self, tag: Tag, spec: SpecOf, contents: Contents) -> list[Parcel]:
        """Send each rank its heads of this rank's tokens; return each rank's tokens of this rank's heads."""
        leaving = [spec(part, self.rank) for part in self.parts]
        return self.exchange(tag, leaving, [spec(self.part, member) for member in self.members], contents)

    def to_tokens(self, tag: Tag, spec: SpecOf, contents: Contents) -> list[Parcel]:
        """Send each rank its tokens of this rank's heads; return each rank's heads of this rank's tokens."""
        leaving = [spec(self.part, member) for member in self.members]
        return self.exchange(tag, leaving, [spec(part, self.rank) for part in self.parts], contents)

    def exchange(
        self, tag: Tag, leaving: list[list[Spec]], arriving: list[list[Spec]], contents: Contents
    ) -> list[Parcel]:
        """All-to-all: one message to each other rank of the group that has something to get."""
        leaving[self.place] = []
        to, here = self.buffers.parcels(f"to {tag.name}", leaving), self.buffers.parcels(f"here {tag.name}", arriving)
        to[self.place] = here[self.place]
        for parcel, arrays in zip(to, contents, strict=True):
            parcel.pack(*arrays)
        # Pairwise: in each step every rank receives from one other and sends to one other. Sends that all start at once
        # meet at some ranks, whose links are busy long after the others are done.
        for step in range(1, len(self.members)):
            source, dest = ((self.place + sign * step) % len(self.members) for sign in (-1, 1))
            requests = [self.group.Irecv(here[source].message, source, tag)] if here[source].buffer.size else []
            if to[dest].buffer.size:
                requests.append(self.group.Isend(to[dest].message, dest, tag))
            Waitall(requests)
        return here


SpecOf = Callable[[Problem, int], list[Spec]]
"""Shapes and dtypes of the arrays of a problem that travel from or to a rank."""

Contents = Iterable[Iterable[Array]]
"""Arrays for each rank of the group; they are made rank by rank, so that only one rank's take memory at a time."""
