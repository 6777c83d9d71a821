"""The most memory that each rank holds in each algorithm, in bytes.

It counts the bytes of all arrays but those that the caller gives (q, k, v, d_out): messages' buffers, sums,
temporaries, and the results. Buffers are kept until the problem changes, so backward comes on top of what the
forward before it has left. What isn't counted: the tiles of the kernel, positions, and what the MPI library holds.
On GPUs, where work is queued, a ring has a buffer more of K/V and one of dK/dV (`ahead`).

With n ranks, equal lengths, one dtype, float32, and g query heads per K/V head, in units of a rank's Q (and without
the rows of lse and delta):

    algorithm    forward                       backward
    dense        rank 0: 4n + 1 + 4n/g         rank 0: 7n + 3 + (8n + 4)/g
                 others: 3 + 2/g               others: 7 + 8/g
    ring         2 + 4/g                       3 + 16/g
    double ring  2 + 8/g                       3 + 26/g
    shared ring  2 + 4/g                       3 + 6/g
    mesh a x b   2a + 3 + 2b/g                 5a + 6 + (4b + 6)/g               (a ranks in a row, b in a column)
    gathered     5a + 2 + 4b/g                 10a + 3 + (10b + 4)/g             (mesh_gathered)
    allgather    2 + 2(n + 1)/g                3 + (6n + 4)/g
    ulysses      7 - 1/n + (6 - 2/n)/g         14 - 3/n + (14 - 2/n)/g
    hybrid u x   a ring of n/u and 5 - 1/u + (6 - 2/u)/g, or a mesh of n/u and (6 - 2/u)(1 + 1/g); backward either
                 and (12 - 4/u)(1 + 1/g)
    tensor parallel: 2 forward, 3 + 4/g backward, in units of the Q of all tokens and 1/n of the heads
    decode: 3 forward, 4 (as a tree 6) and twice K/V of the rank's part of the cache backward; Q is of the new tokens

Allgather with m > 1 head groups: 2 + 4(n + 1)/mg forward, 3 + (4 + (10n + 2)/m)/g backward. The rings have fewer
buffers where they are of one rank. A mask changes nothing: what it saves on the way has its buffer all the same.

The formulas are the same sums over chunks of any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arrays import Spec
from ..messages.parcel import nbytes
from ..problems.problem import Problem


@dataclass(frozen=True)
class Pass:
    """Memory that an algorithm holds in one pass, in bytes, beside its results.

    Attributes
    ----------
    kept : int
        Until the problem changes, or for backward.
    sums : int
        Complete sums from which the results are rounded, where they aren't part of what is kept.
    inside : int
        The most beside what is kept while it computes, the sums included, where that is more than these.
    """

    kept: int = 0
    sums: int = 0
    inside: int = 0


def total(parcels: Sequence[Sequence[Spec]]) -> int:
    """Return the bytes of all parcels."""
    return sum(map(nbytes, parcels))


def largest(parcels: Sequence[Sequence[Spec]]) -> int:
    """Return the bytes of the largest parcel."""
    return max(map(nbytes, parcels), default=0)


def turns(parcels: Sequence[Sequence[Spec]], buffers: int) -> int:
    """Return the bytes of a number of buffers in which parcels take turns: each is as large as its largest parcel."""
    return sum(largest(parcels[start::buffers]) for start in range(buffers))


def sums(problem: Problem, parcels: Sequence[list[Spec]], buffers: int) -> int:
    """Return the bytes of buffers for partial sums, and of those for what travels, where it is rounded."""
    travelling = [problem.sent(parcel) for parcel in parcels]
    return turns(parcels, buffers) + (turns(travelling, buffers) if travelling != parcels else 0)


def arriving(problem: Problem, parcels: Sequence[list[Spec]]) -> int:
    """Return the bytes of buffers for sums that arrive: one for the rank's own, the first, and one for all others."""
    return nbytes(problem.sent(parcels[0])) + largest([problem.sent(parcel) for parcel in parcels])


def running(problem: Problem, owner: int) -> list[list[Spec]]:
    """Return the running out and lse of one rank's queries, two arrays."""
    return [[spec] for spec in problem.o(owner)]


def around(owners: Sequence[int], place: int) -> list[int]:
    """Return the owners in the order in which their chunks come to the rank at a place of a ring."""
    return [owners[place - step] for step in range(len(owners))]
