"""Sums whose shares wait: they are added up some at a time, or when the sum settles, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cupy
import numpy as np

from mpiattn.arrays.cupy.passes import packed_pass
from mpiattn.messages.parcel import Parcel

from ..sums import Sums

Array = Any

TOGETHER = 4  # shares that one pass adds up


class Share(NamedTuple):
    """Result of a call: rows of tokens first, first + 1, ..., and, of an output, the lse of each row."""

    rows: Array
    lse: Array | None
    first: int


@dataclass
class Waiting:
    """A sum that began as nothing, and the shares that wait to be added to it."""

    total: Array  # while it is kept, its address is given to no other array
    lse: Array | None
    shares: list[Share] = field(default_factory=list)
    written: bool = False
    """Whether the sum's own memory already holds a part of it."""


def first_token(total: Array, array: Array) -> int | None:
    """Return which token of a sum an array of some of its rows begins with; None where it is another one's."""
    offset = int(array.data.ptr - total.data.ptr)
    if not 0 <= offset < total.nbytes:
        return None
    return offset // int(total.strides[2]) % int(total.shape[2])


class WaitingSums(Sums):
    """Sums of shares in the dtype of the inputs, which is narrower; the shares of a sum that was begun wait.

    Parameters
    ----------
    dtype : numpy dtype
        Of the shares.
    rounds : bool
        Whether complete sums may be rounded to it: nothing is added to them elsewhere.
    """

    def __init__(self, dtype: np.dtype[np.generic], rounds: bool = True) -> None:
        self.dtype, self.rounds = dtype, rounds
        self.waiting: dict[int, Waiting] = {}

    def begin(self, *sums: Array) -> None:
        """Let sums hold nothing; their memory is written when they settle."""
        lse = next((array for array in sums if array.ndim == 3), None)
        for total in (array for array in sums if array.ndim == 4 and array.size):
            self.waiting[total.data.ptr] = Waiting(total, lse)

    def settle(self, sums: Parcel, *arrived: Sequence[Array]) -> None:
        """Add up what waits and what arrived, rounded where the parcel is to be sent so."""
        if sums.sent_as is not None and self._begun(sums.views):
            self._end(sums.views, arrived, sums.sent_as.arrays)
            sums.rounded = True
        else:
            self._end(sums.arrays, arrived, sums.views)

    def complete(self, sums: Sequence[Array], *arrived: Sequence[Array]) -> Sequence[Array]:
        """Add up what waits and what arrived; return it rounded, in new memory, if the sum has not yet settled."""
        results = sums
        if self.rounds and self._begun(sums):
            results = [cupy.empty(array.shape, self.dtype if array.ndim == 4 else array.dtype) for array in sums]
        self._end(sums, arrived, results)
        return results

    def _begun(self, sums: Sequence[Array]) -> bool:
        return any(array.data.ptr in self.waiting for array in sums)

    def _end(self, sums: Sequence[Array], arrived: Sequence[Sequence[Array]], results: Sequence[Array]) -> None:
        for i, total in enumerate(sums):
            waiting = self.waiting.pop(total.data.ptr, None) if total.ndim == 4 else None
            if waiting is not None:
                self._add_up(waiting, results[i], results[i + 1 :], [shares[i:] for shares in arrived])
            elif i == 0:
                super().complete(sums, *arrived)
                return

    def wait(self, array: Array, rows: Array, first: int, lse: Array | None = None) -> bool:
        """Let a share wait for its sum, if that was begun; the share is of the array's rows from `first` on."""
        whole = self.waiting.get(array.data.ptr)  # which most are
        for waiting in self.waiting.values() if whole is None else (whole,):
            start = first_token(waiting.total, array)
            if start is not None:
                if len(waiting.shares) == TOGETHER:
                    self._flush(waiting)
                waiting.shares.append(Share(rows, lse, start + first))
                return True
        return False

    def write(self, *sums: Array) -> None:
        """Write sums to their own memory, where something else is about to add to them."""
        for waiting in self.waiting.values():
            if not waiting.written and any(first_token(waiting.total, array) is not None for array in sums):
                self._flush(waiting)

    def _flush(self, waiting: Waiting) -> None:
        """Write what a sum holds so far to its own memory."""
        self._add_up(waiting, waiting.total, [] if waiting.lse is None else [waiting.lse])
        waiting.written = True

    def _add_up(
        self, waiting: Waiting, result: Array, result_lse: Sequence[Array] = (), arrived: Sequence[Sequence[Array]] = ()
    ) -> None:
        """Write a sum, of what it held, what waits and what arrived, to a result of its dtype or the inputs'."""
        shares, (there, *there_lse) = waiting.shares, arrived[0] if arrived else (None,)
        pointers = [result, waiting.total if waiting.written else None, there]
        parts = [number for share in shares for number in (share.rows.data.ptr, share.first, share.rows.shape[2])]
        parts += [0] * 3 * (TOGETHER - len(shares))
        name = "sum_parts"
        if waiting.lse is not None:
            name = "merge_parts"
            before = waiting.lse.copy() if waiting.written else None  # threads still read it while one writes the new
            pointers += [result_lse[0], before, *(there_lse or [None])]
            parts += [share.lse.data.ptr for share in shares if share.lse is not None]
            parts += [0] * (TOGETHER - len(shares))
        pass_ = packed_pass(name, self.dtype, waiting.total.dtype if there is None else there.dtype, result)
        pass_(*(0 if array is None else array.data.ptr for array in pointers), more=parts)
        shares.clear()
