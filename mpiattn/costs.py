"""What each rank receives in each algorithm: messages and bytes in closed form, exact for any lengths; no MPI.

What it holds at most is in `memory.py`.

With n ranks, equal lengths, a full mask, one dtype and g query heads per K/V head, in units of a rank's Q
(and without the lse and delta rows):

    algorithm    forward                       backward
    dense        rank 0: (n-1)(1 + 2/g)        rank 0: (n-1)(2 + 2/g)
                 others: 1                     others: 1 + 2/g
    ring         (n-1) 2/g                     (n-1) 4/g
    double ring  (n-1) 2/g                     (n-1) 4/g
    shared ring  0                             0
    mesh a x b   (a-1) 2 + (b-1) 2/g           (a-1) 3 + (b-1) 4/g      (mesh_gathered: the same)
    allgather    (n-1) 2/g                     (n-1) 4/g
    ulysses      (n-1)/n (2 + 2/g)             (n-1)/n (2 + 2/g)
    hybrid u x   (u-1)/u (2 + 2/g) and the ring or mesh of n/u ranks, with 1/u of the heads of u chunks
    tensor parallel: 0; for an output projection, an all-reduce of all tokens' features each way
    decode: with q new tokens, all-reduces of q (head_dim + 2) numbers a head, and of q head_dim; or that, times
    the ranks next below in the tree, and once from above

Ulysses with fewer K/V heads than ranks: (n-1)/n (2 + 2n/H) for H query heads, if n divides H.

Below, the same sums over chunks of any length. A chunk comes to a rank if the rank or one after it on the
ring uses it (`travel.travels`), its partial sums if they start before the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .arrays import Spec
from .kv_cache import CacheProblem
from .parcel import nbytes
from .problem import Problem
from .reduction import even
from .travel import Travel, travels, windows


@dataclass(frozen=True)
class Traffic:
    """What one rank receives."""

    messages: int = 0
    nbytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Costs:
    """What one rank receives, forward and backward."""

    forward: Traffic
    backward: Traffic


def total(parcels: Sequence[Sequence[Spec]]) -> Traffic:
    """Return the traffic of one message for each parcel."""
    return Traffic(len(parcels), sum(map(nbytes, parcels)))


def pieces(parcels: Sequence[Sequence[Spec]]) -> Traffic:
    """Return the traffic of one message for each parcel that has anything in it."""
    return total([parcel for parcel in parcels if nbytes(parcel)])


def spread(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the chunks that travel round it."""
    size = len(owners)
    return total([parcel(owners[o]) for o in range(size) if 0 < (place - o) % size <= ways[o].last])


def collect(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the sums on their way to their owners."""
    home = [parcel(owners[place])] if ways[place].last > 0 else []
    return passing(ways, place, owners, parcel) + total(home)


def passing(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the sums that it adds to and passes on."""
    size = len(owners)
    return total([parcel(owners[o]) for o in range(size) if ways[o].first < (place - o) % size <= ways[o].last])


def sent(problem: Problem, sums: Callable[[int], list[Spec]]) -> Callable[[int], list[Spec]]:
    """Return what says of each rank how its partial sums travel."""
    return lambda rank: problem.sent(sums(rank))


def allreduce(spec: Spec, ranks: int, rank: int) -> Traffic:
    """Return the traffic of an all-reduce of an array: each one's share of the own part, and all other parts."""
    shape, dtype = spec
    parts: list[list[Spec]] = [[((length,), dtype)] for length in even(math.prod(shape), ranks)]
    own = parts.pop(rank)
    return pieces([own] * (ranks - 1) + parts)


def dense(problem: Problem, rank: int) -> Costs:
    """All to rank 0, results back."""
    if rank == 0:
        others = range(1, problem.ranks)
        return Costs(
            total([problem.q(r) + problem.kv(r) for r in others]),
            total([problem.q_backward(r) + problem.kv(r) for r in others]),
        )
    return Costs(total([problem.o(rank)]), total([problem.d_q(rank) + problem.d_kv(rank)]))


def ring(problem: Problem, rank: int) -> Costs:
    """K/V once around; backward dK/dV behind them."""
    ways, owners = travels(problem.needed.T), range(problem.ranks)
    kv = spread(ways, rank, owners, problem.kv)
    return Costs(kv, kv + collect(ways, rank, owners, sent(problem, problem.d_kv)))


def double_ring(problem: Problem, rank: int, outer: int, order: Sequence[int] | None = None) -> Costs:
    """K/V round the row in each window, and from row to row; backward dK/dV behind them in the row, then home.

    `order` has the ranks by their place in the grid, where they aren't in order there.
    """
    ranks = list(range(problem.ranks) if order is None else order)
    inner = problem.ranks // outer
    rows = [ranks[row * inner :][:inner] for row in range(outer)]
    r, c = divmod(ranks.index(rank), inner)
    col = [row[c] for row in rows]
    in_col, in_row = windows(problem.needed, rows)
    kv = spread([in_col[owner] for owner in col], r, col, problem.kv)
    d_kv = Traffic()
    for window in range(outer):
        owners = rows[(r - window) % outer]
        ways = [in_row[window][owner] for owner in owners]
        kv += spread(ways, c, owners, problem.kv)
        d_kv += passing(ways, c, owners, sent(problem, problem.d_kv))
        if in_row[window][rank].first <= in_row[window][rank].last:
            d_kv += total([problem.sent(problem.d_kv(rank))])
    return Costs(kv, kv + d_kv)


def shared_ring(problem: Problem, rank: int) -> Costs:
    """Read in place, in the memory of the host: nothing is received."""
    return Costs(Traffic(), Traffic())


def mesh(problem: Problem, rank: int, rows: int, cols: int) -> Costs:
    """Q and its sums along the row, K/V and theirs along the column."""
    r, c = divmod(rank, cols)
    tile = problem.needed.reshape(rows, cols, rows, cols)
    q_ways, q_owners = travels(tile[r].any(axis=1)), [r * cols + place for place in range(cols)]
    kv_ways, kv_owners = travels(tile[:, :, :, c].any(axis=1).T), [place * cols + c for place in range(rows)]
    kv = spread(kv_ways, r, kv_owners, problem.kv)
    return Costs(
        spread(q_ways, c, q_owners, problem.q) + kv + collect(q_ways, c, q_owners, sent(problem, problem.o)),
        spread(q_ways, c, q_owners, problem.q_backward)
        + kv
        + collect(q_ways, c, q_owners, sent(problem, problem.d_q))
        + collect(kv_ways, r, kv_owners, sent(problem, problem.d_kv)),
    )


def mesh_gathered(problem: Problem, rank: int, rows: int, cols: int) -> Costs:
    """Q from the row, K/V from the column, and of the own sums what each rank there has computed."""
    r, c = divmod(rank, cols)
    tile = problem.needed.reshape(rows, cols, rows, cols)
    q_owners, kv_owners = ([r * cols + place for place in range(cols)], [place * cols + c for place in range(rows)])
    q_owners.remove(rank)
    kv_owners.remove(rank)
    q_shares = sum(bool(tile[r, c, :, place].any()) for place in range(cols) if place != c)
    kv_shares = sum(bool(tile[place, :, r, c].any()) for place in range(rows) if place != r)
    kv = pieces([problem.kv(owner) for owner in kv_owners])
    return Costs(
        pieces([problem.q(owner) for owner in q_owners]) + kv + pieces([problem.sent(problem.o(rank))] * q_shares),
        pieces([problem.q_backward(owner) for owner in q_owners])
        + kv
        + pieces([problem.sent(problem.d_q(rank))] * q_shares)
        + pieces([problem.sent(problem.d_kv(rank))] * kv_shares),
    )


def allgather(problem: Problem, rank: int, head_groups: int = 1) -> Costs:
    """K/V of each group of heads from every other rank; backward dK/dV of each one that has computed any, too."""
    others = [owner for owner in range(problem.ranks) if owner != rank]
    parts = [part for *_, part in problem.by_heads(min(head_groups, problem.kv_heads))]
    kv = pieces([part.kv(owner) for part in parts for owner in others])
    users = [user for user in others if problem.needed[user, rank]]
    return Costs(kv, kv + pieces([part.d_kv(rank) for part in parts for _ in users]))


def ulysses(problem: Problem, rank: int) -> Costs:
    """Some heads of every other rank's tokens; back, every other rank's heads of the own tokens."""
    return exchange(problem, rank, range(problem.ranks))


def exchange(problem: Problem, rank: int, members: Sequence[int]) -> Costs:
    """Tokens for heads and back, among the ranks of a group."""
    place = members.index(rank)
    parts = [part for *_, part in problem.by_heads(len(members))]
    own, others = parts[place], [*parts[:place], *parts[place + 1 :]]
    tokens = [member for member in members if member != rank]
    partial = sum(part.kv_heads for part in parts) > problem.kv_heads
    return Costs(
        pieces([own.qkv(member) for member in tokens] + [part.out(rank) for part in others]),
        pieces([own.d_out(member) for member in tokens] + [part.d_qkv(rank, partial) for part in others]),
    )


def hybrid(problem: Problem, rank: int, ulysses: int, rows: int, cols: int = 1) -> Costs:
    """The exchange in the group, and a ring or a mesh of the ranks with the same heads."""
    number, place = divmod(rank, ulysses)
    group = exchange(problem, rank, range(number * ulysses, (number + 1) * ulysses))
    *_, part = problem.by_heads(ulysses)[place]
    if not part.heads:
        return group
    chunks = replace(part, ranks=rows * cols, layout=problem.layout.partition("/")[0])
    inner = ring(chunks, number) if cols == 1 else mesh(chunks, number, rows, cols)
    return Costs(group.forward + inner.forward, group.backward + inner.backward)


def decode(problem: CacheProblem, rank: int, combine: str = "allreduce") -> Costs:
    """All-reduces of lse, and of out and its weight; or (out, lse) from below in the tree, and from above."""
    if combine == "allreduce":
        [(shape, wide), (rows, _)], [d_q] = problem.o(rank), problem.d_q(rank)
        parts = (rows, wide), ((*rows, shape[3] + 1), wide), d_q
        top, sums, d_q_sum = (allreduce(part, problem.ranks, rank) for part in parts)
        return Costs(top + sums, d_q_sum)
    steps = [2**level for level in range((problem.ranks - 1).bit_length())]
    below = [step for step in steps if rank % (2 * step) == 0 and any(problem.sees[rank + step :][:step])]
    messages = len(below) + (rank > 0)
    return Costs(total([problem.o(rank)] * messages), total([problem.d_q(rank)] * messages))


def tensor_parallel(problem: Problem, rank: int, features: int = 0) -> Costs:
    """Nothing; with an output projection to that many features its all-reduce, and that of the input's gradient."""
    traffic = allreduce(((problem.batch, problem.q_tokens, features), problem.wide), problem.ranks, rank)
    return Costs(traffic, traffic)


def sink_gradient(problem: Problem, rank: int) -> Traffic:
    """An all-reduce of a number for each head, in every algorithm that spreads the queries over ranks."""
    return allreduce(((problem.heads,), problem.wide), problem.ranks, rank) if problem.q_spread else Traffic()


COSTS: dict[str, Callable[..., Costs]] = {
    "dense": dense,
    "ring": ring,
    "double_ring": double_ring,
    "shared_ring": shared_ring,
    "mesh": mesh,
    "mesh_gathered": mesh_gathered,
    "allgather": allgather,
    "ulysses": ulysses,
    "hybrid": hybrid,
    "tensor_parallel": tensor_parallel,
    "decode": decode,
}
"""By the algorithm's name; called with the problem, the rank and the algorithm's own parameters."""
