"""Traffic that each rank receives in each algorithm: messages and bytes.

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
    the ranks next below in the tree, and once from above; or (n-1)/n of q (head_dim + 1) by an all-to-all of heads,
    backward (n-1)/n of q (head_dim + 2) and the all-reduce

Ulysses with fewer K/V heads than ranks: (n-1)/n (2 + 2n/H) for H query heads, if n divides H.

The formulas are the same sums over chunks of any length. A chunk comes to a rank if the rank or one after it on the
ring uses it (`travel.travels`), its partial sums if they start before the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..arrays import Spec
from ..messages.parcel import nbytes
from ..messages.reduction import even
from ..problems.problem import Problem
from ..problems.travel import Travel


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes that one rank receives."""

    messages: int = 0
    nbytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Costs:
    """Traffic that one rank receives, forward and backward."""

    forward: Traffic
    backward: Traffic


def messages(parcels: Sequence[Sequence[Spec]]) -> Traffic:
    """Return the traffic of one message for each parcel."""
    return Traffic(len(parcels), sum(map(nbytes, parcels)))


def pieces(parcels: Sequence[Sequence[Spec]]) -> Traffic:
    """Return the traffic of one message for each parcel that has anything in it."""
    return messages([parcel for parcel in parcels if nbytes(parcel)])


def spread(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the chunks that travel round it."""
    size = len(owners)
    return messages([parcel(owners[o]) for o in range(size) if 0 < (place - o) % size <= ways[o].last])


def collect(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the sums on their way to their owners."""
    home = [parcel(owners[place])] if ways[place].last > 0 else []
    return passing(ways, place, owners, parcel) + messages(home)


def passing(ways: Sequence[Travel], place: int, owners: Sequence[int], parcel: Callable[[int], list[Spec]]) -> Traffic:
    """Return what the rank at a place of a ring receives of the sums that it adds to and passes on."""
    size = len(owners)
    return messages([parcel(owners[o]) for o in range(size) if ways[o].first < (place - o) % size <= ways[o].last])


def sent(problem: Problem, sums: Callable[[int], list[Spec]]) -> Callable[[int], list[Spec]]:
    """Return a function of the rank: shapes and dtypes of its partial sums as they travel."""
    return lambda rank: problem.sent(sums(rank))


def allreduce(spec: Spec, ranks: int, rank: int) -> Traffic:
    """Return the traffic of an all-reduce of an array: this rank's part from every other rank, then all other parts."""
    shape, dtype = spec
    parts: list[list[Spec]] = [[((length,), dtype)] for length in even(math.prod(shape), ranks)]
    own = parts.pop(rank)
    return pieces([own] * (ranks - 1) + parts)


def sink_gradient(problem: Problem, rank: int) -> Traffic:
    """An all-reduce of a number for each head, in every algorithm that spreads the queries over ranks."""
    return allreduce(((problem.heads,), problem.wide), problem.ranks, rank) if problem.q_spread else Traffic()
