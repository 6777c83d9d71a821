"""What each rank receives in each algorithm: messages and bytes in closed form, exact for any lengths; no MPI.

With n ranks, equal lengths, a full mask, one dtype and g query heads per K/V head, in units of a rank's Q
(and without the lse and delta rows):

    algorithm    forward                       backward
    dense        rank 0: (n-1)(1 + 2/g)        rank 0: (n-1)(2 + 2/g)
                 others: 1                     others: 1 + 2/g
    ring         (n-1) 2/g                     (n-1) 4/g
    double ring  (n-1) 2/g                     (n-1) 4/g
    shared ring  0                             0
    mesh a x b   (a-1) 2 + (b-1) 2/g           (a-1) 3 + (b-1) 4/g

Below, the same sums over chunks of any length. A chunk comes to a rank if the rank or one after it on the
ring uses it (`problem.travels`), its partial sums if they start before the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .arrays import Spec, nbytes
from .problem import Problem, Travel, travels, windows


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


def allreduce_parts(length: int, ranks: int, rank: int) -> list[int]:
    """Return what a rank receives in an all-reduce of a buffer of that length, round a ring.

    The buffer is cut in as many parts as there are ranks, as even as can be. Their sums go round until each
    is complete on the rank of its number, and then round again: all parts but one come each time.
    """
    parts = [(part + 1) * length // ranks - part * length // ranks for part in range(ranks)]
    return [parts[p] for absent in ((rank - 1) % ranks, rank) for p in range(ranks) if p != absent]


def allreduce(spec: Spec, ranks: int, rank: int) -> Traffic:
    """Return the traffic of an all-reduce of an array."""
    shape, dtype = spec
    sizes = [part * dtype.itemsize for part in allreduce_parts(math.prod(shape), ranks, rank) if part]
    return Traffic(len(sizes), sum(sizes))


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
    return Costs(kv, kv + collect(ways, rank, owners, problem.d_kv))


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
        d_kv += passing(ways, c, owners, problem.d_kv)
        if in_row[window][rank].first <= in_row[window][rank].last:
            d_kv += total([problem.d_kv(rank)])
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
        spread(q_ways, c, q_owners, problem.q) + kv + collect(q_ways, c, q_owners, problem.o),
        spread(q_ways, c, q_owners, problem.q_backward)
        + kv
        + collect(q_ways, c, q_owners, problem.d_q)
        + collect(kv_ways, r, kv_owners, problem.d_kv),
    )


COSTS: dict[str, Callable[..., Costs]] = {
    "dense": dense,
    "ring": ring,
    "double_ring": double_ring,
    "shared_ring": shared_ring,
    "mesh": mesh,
}
"""By the algorithm's name; called with the problem, the rank and the algorithm's own parameters."""
