"""Sums over the ranks by plain messages, added up in the order of the ranks.

MPI leaves it to the library in which order `Allreduce` and `Ireduce_scatter` add. Floating-point sums depend on it,
and it differs between libraries, lengths of message, and places of the ranks on the nodes. Here every share travels
to the rank that adds it up, so the bits are the same with every library, run after run. What is given up is what
a library does for many ranks and few numbers: trees, whose messages are fewer, and sums made in the network.

With 3 ranks, each with an array a, b, c of its own in 3 pieces:

                       reduce-scatter                   all-gather
    rank 0:  a0 b0 c0  1: a1, 2: a2 ->  A = a0+a1+a2    1: B, 2: C ->  A B C
    rank 1:  a1 b1 c1  2: b2, 0: b0 ->  B = b0+b1+b2    2: C, 0: A ->  A B C
    rank 2:  a2 b2 c2  0: c0, 1: c1 ->  C = c0+c1+c2    0: A, 1: B ->  A B C
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..arrays import Array, namespace
from .message import Communicator, Request, Tag, Waitall
from .parcel import Parcel


def exchange(
    comm: Communicator, tag: Tag, leaving: Mapping[int, Parcel], arriving: Mapping[int, Parcel]
) -> list[Request]:
    """Start to send other ranks a parcel each, and to receive theirs, where there is anything in it.

    A reduce-scatter, but for the sum: that is the caller's, once the messages have come.

    Parameters
    ----------
    leaving, arriving
        By the other rank; one for this rank itself stays where it is.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    requests = []
    for step in range(1, size):  # pairwise, so that not all ranks begin with the same one
        source, dest = (rank - step) % size, (rank + step) % size
        if source in arriving and arriving[source].buffer.size:
            requests.append(comm.Irecv(arriving[source].message, source, tag))
        if dest in leaving and leaving[dest].buffer.size:
            requests.append(comm.Isend(leaving[dest].message, dest, tag))
    return requests


def all_reduce(comm: Communicator, array: Array, combine: Callable[[Parcel, Parcel], None] = Parcel.add) -> None:
    """Add up an array over the ranks, in place: a reduce-scatter of its pieces, and their all-gather.

    Parameters
    ----------
    array : contiguous, the same shape and dtype on every rank
    combine : function
        Combines a parcel with another one, in place, such as `maximum`.
    """
    if comm.Get_size() == 1:
        return
    rank, data, parts, start = comm.Get_rank(), array.reshape(-1).view(np.uint8), [], 0
    for length in even(array.size, comm.Get_size()):
        parts.append(Parcel([((length,), array.dtype)], data[start:]))
        start += parts[-1].buffer.size
    own = parts[rank]
    shares = [Parcel(own.specs, namespace(array).empty(own.buffer.size, np.uint8)) for _ in parts[1:]]
    shares.insert(rank, own)
    Waitall(exchange(comm, Tag.SCATTER, dict(enumerate(parts)), dict(enumerate(shares))))
    total, *others = shares
    for share in others:
        combine(total, share)
    if total is not own:
        own.pack(*total.arrays)
    Waitall(exchange(comm, Tag.GATHER, dict.fromkeys(range(len(parts)), own), dict(enumerate(parts))))


def maximum(total: Parcel, other: Parcel) -> None:
    """Keep the larger one of each two numbers."""
    for place, array in zip(total.arrays, other.arrays, strict=True):
        namespace(place).maximum(place, array, out=place)


def even(length: int, parts: int) -> list[int]:
    """Return the lengths of so many parts of an array, as even as can be."""
    return [(part + 1) * length // parts - part * length // parts for part in range(parts)]
