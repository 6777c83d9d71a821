"""The state that `forward` leaves for `backward`, and a check that it is unchanged."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..problems.dropout import Dropout
from ..problems.problem import Problem
from .agreement import Agreement
from .given import drawn
from .posed import described, same_forward, show


@dataclass(frozen=True)
class Saved:
    """The state that `forward` leaves for `backward`: this rank's share of everything, nothing that grows with n.

    `out` and `lse` belong to the queries that `forward` was given; `lse` is the natural logarithm of the sum of
    exponentials of each query's scores, its sink included, float64, (batch, heads, tokens), -inf where there are none.
    q, k, v are what this rank computed with: its tokens, or where heads are exchanged, its heads.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    problem: Problem
    sinks: Array | None = None
    dropout: Dropout | None = None
    by: tuple[object, ...] = ()
    """The attention that made it: its `Attention.identity`."""
    print: int = 0
    """Fingerprint of q, k, v, out, lse and sinks."""
    number: int = 0
    """Number of the `forward` among those of the attention; 0 where the ranks trust each other, see `Agreement`."""


ROW = 512
"""Words of 64 bits in a row of those that `fingerprint` sums."""


def fingerprint(*arrays: object) -> int:
    """Return a number that differs where values or their order do; 0 of arrays that aren't in the memory of the host.

    Made of sums of 64-bit words along rows and columns, about as fast as memory: it is to notice that an array was used
    for something else meanwhile.
    """
    total = 0
    for number, array in enumerate(arrays):
        if isinstance(array, np.ndarray) and array.size:  # a memmap too
            data = array.ravel(order="K").view(np.uint8)  # as it lies in memory
            whole = data.size // (8 * ROW) * (8 * ROW)
            words = data[:whole].view(np.uint64).reshape(-1, ROW)
            for part in (words.sum(axis=0), words.sum(axis=1), data[whole:]) if whole else (data,):
                total = zlib.crc32(part.tobytes(), total + number)
    return total


def check_saved(
    agreement: Agreement, d_out: Array, saved: Any, identity: tuple[object, ...], fingerprint: Callable[..., int]
) -> None:
    """Raise InputError on every rank where, on one, d_out does not fit what was saved, or that is not `forward`'s."""
    own = isinstance(saved, Saved) and saved.by == identity
    saves = (saved.problem.sizes, saved.sinks is not None, drawn(saved.dropout)) if own else None
    intact = not own or saved.print == fingerprint(saved.q, saved.k, saved.v, saved.out, saved.lse, saved.sinks)
    numbers = own, zlib.crc32(repr(saves).encode())
    number = saved.number if own else 0
    table = agreement.describe(d_out, saved.out if own else None, numbers=[*numbers, intact, number])
    agreement.refuse(table, d_out=d_out)
    agreed_saved(table[:, :-1].tobytes(), len(table))
    if len(table) > 1:
        same_forward(table[:, -1:])  # of a new number each time: not among what is kept


@functools.lru_cache(maxsize=16)
def agreed_saved(table: bytes, ranks: int) -> None:
    """Raise InputError where d_out does not fit what was saved, or that is not what `forward` left, on any rank.

    Parameters
    ----------
    table : for each rank, the descriptions of d_out and out; whether this attention made what was saved, a checksum of
        its problem, and whether it is unchanged
    """
    rows = np.frombuffer(table, np.int64).reshape(ranks, -1)
    for rank, owned in enumerate(rows[:, -3]):
        if not owned:
            raise InputError(
                f"on rank {rank}, saved is not what forward of this algorithm returns with the same options, or it was "
                "changed since"
            )
    specs = described(rows[:, :-1].tobytes(), ranks, 2)
    for rank, (gradient, out) in enumerate(specs):
        if gradient != out:
            raise InputError(f"d_out on rank {rank} is {show(gradient)}, but out is {show(out)}")
    for rank, whole in enumerate(rows[:, -1]):
        if not whole:
            raise InputError(
                f"q, k, v, out, lse or sinks were changed on rank {rank} between forward and backward, which reads "
                "them again: give forward copies, or change copies"
            )
