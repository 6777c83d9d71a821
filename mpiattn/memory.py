"""The most memory that each rank holds in each algorithm, in closed form, exact for any lengths; no MPI.

It counts the bytes of all arrays but those that the caller gives (q, k, v, d_out): messages' buffers, sums,
temporaries, and the results. Buffers are kept until the problem changes, so backward comes on top of what the
forward before it has left. What isn't counted: the tiles of the kernel, positions, and what the MPI library holds.
This is so on CPUs; on GPUs there is a buffer more where kernels are queued, and lse needs half.

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

Below, the same sums over chunks of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .arrays import Spec
from .kv_cache import CacheProblem
from .parcel import nbytes
from .problem import Problem
from .reduction import even
from .softmax import LSE


@dataclass(frozen=True)
class Peak:
    """The most bytes that one rank holds at one moment."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Pass:
    """What an algorithm holds in one pass, in bytes, beside its results.

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


def peak(name: str, problem: Problem, rank: int, **arguments: int | str) -> Peak:
    """Return the most that a rank holds in an algorithm, by its name and its own arguments."""
    if problem.spread_heads:
        heads, kv_heads = problem.spread_heads[rank]
        problem = replace(problem, heads=heads, kv_heads=kv_heads)
    forward, backward = PASSES[name](problem, rank, **arguments)
    saved, row_delta = nbytes(problem.out(rank)), nbytes(problem.out(rank)[:1])
    gradients = nbytes(problem.qkv(rank))
    return Peak(
        forward.kept + max(forward.inside, forward.sums + saved),
        forward.kept + saved + row_delta + backward.kept + max(backward.inside, backward.sums + gradients),
    )


def total(parcels: Sequence[Sequence[Spec]]) -> int:
    """Return the bytes of all parcels."""
    return sum(map(nbytes, parcels))


def largest(parcels: Sequence[Sequence[Spec]]) -> int:
    """Return the bytes of the largest parcel."""
    return max(map(nbytes, parcels), default=0)


def turns(parcels: Sequence[Sequence[Spec]], buffers: int) -> int:
    """Return the bytes of so many buffers in which the parcels take turns."""
    return sum(largest(parcels[start::buffers]) for start in range(buffers))


def sums(problem: Problem, parcels: Sequence[list[Spec]], buffers: int) -> int:
    """Return the bytes of buffers for partial sums, and of those for what travels, where it is rounded."""
    travelling = [problem.sent(parcel) for parcel in parcels]
    return turns(parcels, buffers) + (turns(travelling, buffers) if travelling != parcels else 0)


def arriving(problem: Problem, parcels: Sequence[list[Spec]]) -> int:
    """Return the bytes of buffers for sums that arrive: the own one, which is the first, and the others in turns."""
    return nbytes(problem.sent(parcels[0])) + largest([problem.sent(parcel) for parcel in parcels])


def running(problem: Problem, owner: int) -> list[list[Spec]]:
    """Return the running out and lse of one rank's queries, two arrays."""
    out, (rows, _) = problem.o(owner)
    return [[out], [(rows, LSE)]]


def around(owners: Sequence[int], place: int) -> list[int]:
    """Return the owners in the order in which their chunks come to the rank at a place of a ring."""
    return [owners[place - step] for step in range(len(owners))]


def dense(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """On rank 0 what arrived, all of it joined, its results, and these in parts."""
    ranks = range(problem.ranks)
    inputs = [problem.q(r) + problem.kv(r) for r in ranks]
    inputs_backward = [problem.q_backward(r) + problem.kv(r) for r in ranks]
    results = [problem.o(r) for r in ranks]
    results_backward = [problem.d_q(r) + problem.d_kv(r) for r in ranks]
    if rank:
        return (
            Pass(nbytes(inputs[rank]) + nbytes(results[rank])),
            Pass(nbytes(inputs_backward[rank]) + nbytes(results_backward[rank])),
        )
    states = [running(problem, r) for r in ranks]
    return (
        Pass(
            nbytes(inputs[0]) + total(results),
            inside=total(inputs[1:]) + total(inputs) + sum(map(total, states)) + max(map(total, states)),
        ),
        Pass(
            nbytes(inputs_backward[0]) + total(results_backward),
            inside=total(inputs_backward[1:])
            + total(inputs_backward)
            + total(results_backward)
            + largest(results_backward),
        ),
    )


def ring(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Two buffers of K/V; backward two of dK/dV, the own ones, and two for those that arrive."""
    owners = around(range(problem.ranks), rank)
    d_kv = [problem.d_kv(owner) for owner in owners]
    kept = nbytes(problem.d_q(rank)) + nbytes(d_kv[0]) + sums(problem, d_kv, 2) + arriving(problem, d_kv)
    return (
        Pass(turns([problem.kv(owner) for owner in owners], 2), total(running(problem, rank))),
        Pass(kept),
    )


def double_ring(problem: Problem, rank: int, outer: int, order: Sequence[int] | None = None) -> tuple[Pass, Pass]:
    """Two buffers for the row and two for what comes from another, of K/V and of dK/dV; three for what arrives."""
    ranks = list(range(problem.ranks) if order is None else order)
    inner = problem.ranks // outer
    rows = [ranks[row * inner :][:inner] for row in range(outer)]
    r, c = divmod(ranks.index(rank), inner)
    windows = [around(rows[r - window], c) for window in range(outer)]
    first, others = [window[0] for window in windows], [owner for window in windows for owner in window[1:]]
    last, before = [window[-1] for window in windows], [owner for window in windows for owner in window[:-1]]
    kv = turns([problem.kv(owner) for owner in first], 2) + turns([problem.kv(owner) for owner in others], 2)
    d_kv = sum(sums(problem, [problem.d_kv(owner) for owner in owners], 2) for owners in (last, before))
    own = problem.d_kv(rank)
    arrived = 2 * nbytes(problem.sent(own)) + largest([problem.sent(problem.d_kv(owner)) for owner in ranks])
    return (
        Pass(kv, total(running(problem, rank))),
        Pass(nbytes(own) + d_kv + arrived, nbytes(problem.d_q(rank))),
    )


def shared_ring(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Its part of the window, for K/V and for dK/dV."""
    window = nbytes(problem.d_kv(rank) + problem.kv(rank))
    return Pass(window, total(running(problem, rank))), Pass(0, nbytes(problem.d_q(rank)))


def mesh(problem: Problem, rank: int, rows: int, cols: int) -> tuple[Pass, Pass]:
    """The tile's Q, K/V and sums, each in as many buffers as there are ranks, and two for each kind that arrives."""
    r, c = divmod(rank, cols)
    in_row = around(range(r * cols, (r + 1) * cols), c)
    in_col = around(range(c, problem.ranks, cols), r)
    o, d_q = [problem.o(owner) for owner in in_row], [problem.d_q(owner) for owner in in_row]
    d_kv = [problem.d_kv(owner) for owner in in_col]
    q, kv = total([problem.q(owner) for owner in in_row]), total([problem.kv(owner) for owner in in_col])
    forward = q + kv + sums(problem, o, cols) + arriving(problem, o)
    backward = total([problem.q_backward(owner) for owner in in_row])
    backward += sums(problem, d_q, cols) + arriving(problem, d_q)
    backward += sums(problem, d_kv, rows) + arriving(problem, d_kv)
    return Pass(forward), Pass(backward)


def mesh_gathered(problem: Problem, rank: int, rows: int, cols: int) -> tuple[Pass, Pass]:
    """The tile's Q and K/V as they arrive and joined, its sums, these in parts, and those of the own ones."""

    def pieces(parcels: Sequence[Sequence[Spec]]) -> int:
        return sum(-(-nbytes(parcel) // 8) * 8 for parcel in parcels)

    def exchanged(parcels: Sequence[list[Spec]], place: int) -> int:
        travelling = [problem.sent(parcel) for parcel in parcels]
        return nbytes(parcels[place]) + pieces(travelling) + pieces([travelling[place]] * len(parcels))

    r, c = divmod(rank, cols)
    in_row, in_col = range(r * cols, (r + 1) * cols), range(c, problem.ranks, cols)
    q, kv = [problem.q(owner) for owner in in_row], [problem.kv(owner) for owner in in_col]
    o, states = [problem.o(owner) for owner in in_row], [running(problem, owner) for owner in in_row]
    q_backward = [problem.q_backward(owner) for owner in in_row]
    d_q, d_kv = [problem.d_q(owner) for owner in in_row], [problem.d_kv(owner) for owner in in_col]
    home_q, home_kv = exchanged(d_q, c), exchanged(d_kv, r)
    computed = total(q_backward) + total(kv) + total(d_q) + total(d_kv)
    return (
        Pass(
            pieces(q) + pieces(kv) + exchanged(o, c),
            inside=total(q) + total(kv) + sum(map(total, states)) + max(map(total, states)),
        ),
        Pass(
            pieces(q_backward) + home_q + home_kv,
            inside=computed + max(largest(d_q) - home_kv, largest(d_kv)),  # dQ goes before there are buffers for dK/dV
        ),
    )


def allgather(problem: Problem, rank: int, head_groups: int = 1) -> tuple[Pass, Pass]:
    """K/V of two groups of heads from all ranks, and dK/dV for all; of one group what the others have of its own."""
    ranks = range(problem.ranks)
    parts = [part for *_, part in problem.by_heads(min(head_groups, problem.kv_heads))]
    kv = turns([part.kv(rank) for part in parts], 2) + turns(
        [[s for r in ranks for s in part.kv(r)] for part in parts], 2
    )
    d_kv = sum(turns([part.d_kv(r) for part in parts], 2) for r in ranks)
    d_kv += (problem.ranks - 1) * largest([part.d_kv(rank) for part in parts])
    return (
        Pass(kv, total(running(problem, rank))),
        Pass(d_kv, nbytes(problem.d_q(rank)) + nbytes(problem.d_kv(rank))),
    )


def ulysses(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """All tokens of some heads: what is exchanged, joined, and computed of it."""
    members = range(problem.ranks)
    *_, part = problem.by_heads(problem.ranks)[rank]
    states = sum(total(running(part, member)) for member in members)
    gradients = total([part.d_q(member) + part.d_kv(member) for member in members])
    return exchange(problem, rank, members, (Pass(0, states), Pass(0, gradients)), LSE)


def exchange(
    problem: Problem, rank: int, members: Sequence[int], inner: tuple[Pass, Pass], lse: np.dtype[np.floating]
) -> tuple[Pass, Pass]:
    """What is exchanged in a group, forth and back, and what is joined of it, beside what is done inside.

    `lse` is the dtype of the lse that comes from inside.
    """
    parts = [part for *_, part in problem.by_heads(len(members))]
    place = members.index(rank)
    own = parts[place]
    partial = sum(part.kv_heads for part in parts) > problem.kv_heads

    def exchanged(spec: Callable[[Problem, int], list[Spec]]) -> int:
        leaving = [spec(part, rank) for part in parts[:place] + parts[place + 1 :]]
        return total(leaving) + total([spec(own, member) for member in members])

    def out(member: int) -> list[list[Spec]]:
        values, (rows, _) = own.o(member)
        return [[values], [(rows, lse)]]

    forward, backward = inner
    return (
        Pass(
            exchanged(Problem.qkv)
            + total([own.qkv(member) for member in members])
            + forward.kept
            + nbytes(problem.o(rank))
            + exchanged(Problem.out),
            inside=forward.sums + max(total(out(member)) for member in members),
        ),
        Pass(
            exchanged(Problem.d_out)
            + total([own.d_out(member) for member in members])
            + backward.kept
            + nbytes(problem.d_kv(rank) + problem.d_q(rank))
            + exchanged(lambda part, owner: part.d_qkv(owner, partial)),
            inside=backward.sums + largest([own.d_kv(member) + own.d_q(member) for member in members]),
        ),
    )


def hybrid(problem: Problem, rank: int, ulysses: int, rows: int, cols: int = 1) -> tuple[Pass, Pass]:
    """What is exchanged in the group, and a ring or a mesh of the ranks with the same heads."""
    number, place = divmod(rank, ulysses)
    *_, part = problem.by_heads(ulysses)[place]
    inner = Pass(), Pass()
    if part.heads:
        chunks = replace(part, ranks=rows * cols, layout=problem.layout.partition("/")[0])
        inner = ring(chunks, number) if cols == 1 else mesh(chunks, number, rows, cols)
    members = range(number * ulysses, (number + 1) * ulysses)
    return exchange(problem, rank, members, inner, LSE if cols == 1 else problem.wide)


def tensor_parallel(problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Sums only; `project` and `all_reduce` are the caller's."""
    return (
        Pass(0, total(running(problem, rank))),
        Pass(0, nbytes(problem.d_q(rank)) + nbytes(problem.d_kv(rank))),
    )


def decode(problem: CacheProblem, rank: int, combine: str = "allreduce") -> tuple[Pass, Pass]:
    """Partial results of the new tokens; their sums, and what arrives of these, or rows to normalise them."""
    o, d_q, d_kv = nbytes(problem.o(rank)), nbytes(problem.d_q(rank)), nbytes(problem.d_kv(rank))
    if combine == "tree":
        return Pass(2 * o), Pass(2 * d_q, d_kv)
    (shape, wide), row = problem.o(rank)[1], nbytes(problem.o(rank)[1:])

    def arriving(nbytes: int) -> int:
        size = int(wide.itemsize)
        return (problem.ranks - 1) * even(nbytes // size, problem.ranks)[rank] * size

    return (
        Pass(o, o + row, o + row + max(3 * row + math.prod(shape), arriving(o))),
        Pass(d_q, d_kv, d_kv + arriving(d_q)),
    )


PASSES: dict[str, Callable[..., tuple[Pass, Pass]]] = {
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
"""Forward and backward by the algorithm's name; called with the problem, the rank and the algorithm's own arguments."""
