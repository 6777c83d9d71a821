"""Words of the ranks of a communicator to each other before the first message of a pass.

Each describes what it was given in integers, and one collective brings all of them to every rank. Functions of them
alone, in `posed`, say what fits. So every rank says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..errors import InputError
from ..messages.connection import rows
from ..messages.message import Communicator
from ..problems.mask import Positions
from ..problems.problem import Problem
from ..problems.user_mask import TabulatedMask, UserMask

T = TypeVar("T")

OF_TOKENS = ("q", "k", "v", "d_out")


class Agreement:
    """Words of the ranks of a communicator to each other before the first message of a pass."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.batch: object = None
        self.passes = 0
        self.told: dict[bytes, NDArray[np.int64]] = {}
        """Answers of all ranks from when this one said the same of the same batch; see `trust`."""

    def trust(self, batch: object) -> None:
        """Ask each thing once for a batch, or with None each time.

        For who has agreed on all that decides what each rank will say of it: the ranks then need the same answers at
        the same time.
        """
        if batch is not self.batch:
            self.batch, self.told = batch, {}

    def number(self) -> int:
        """Return the number of this pass among those that the ranks ask each other about; 0 within a batch."""
        self.passes += self.batch is None
        return self.passes if self.batch is None else 0

    def describe(self, *values: object, numbers: Sequence[int] = ()) -> NDArray[np.int64]:
        """Return the descriptions of every array of every rank, and behind them its numbers: a row for each rank."""
        own = np.array([*chain.from_iterable(map(arrays.describe, values)), *numbers], np.int64)
        known = self.told.get(own.tobytes())
        if known is not None:
            return known
        everything = rows(self.comm, own)
        if self.batch is not None:
            self.told[own.tobytes()] = everything
        return everything

    def arrays(self, numbers: Sequence[int] = (), **values: object) -> NDArray[np.int64]:
        """Return what `describe` does, of arguments by name, or raise InputError where one can't be described."""
        table = self.describe(*values.values(), numbers=numbers)
        self.refuse(table, **values)
        return table

    def refuse(self, table: NDArray[np.int64], **values: object) -> None:
        """Raise InputError on every rank where one of the first values in a table is no array that can be sent."""
        codes = table[:, 1 : len(values) * arrays.DESCRIPTION : arrays.DESCRIPTION]
        if (codes >= 0).all():
            return
        wrong = [arrays.told(value) for value in values.values()]
        for rank, (row, texts) in enumerate(zip(codes, self.comm.allgather(wrong), strict=True)):
            for name, code, text in zip(values, row, texts, strict=True):
                if code < 0:
                    axes = " of 4 axes (batch, heads, tokens, head_dim)" if name in OF_TOKENS else ""
                    raise InputError(
                        f"{name} on rank {rank} is {text}; it must be an array{axes}, NumPy's or CuPy's, of "
                        f"{', '.join(arrays.FLOAT_NAMES)}"
                    )

    def together(self, make: Callable[[], T]) -> T:
        """Return what is made, on every rank; where that raises on one, raise the same InputError on all."""
        result, wrong = None, ""
        try:
            result = make()
        except InputError as error:
            wrong = str(error)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        reasons = self.comm.allgather(wrong)
        for rank, reason in enumerate(reasons):
            if reason:
                raise InputError(reason if len(set(reasons)) == 1 else f"rank {rank}: {reason}")
        return cast("T", result)


def settled(comm: Communicator, problem: Problem, last: Problem | None) -> Problem:
    """Return a problem with a mask that needs no user's code any more; one collective, where the mask is a user's.

    None where the last problem, of whatever arrays, had as many queries at the same place and as many keys.
    """
    if not isinstance(problem.mask, UserMask):
        return problem
    known = last.mask if last is not None else None
    if isinstance(known, TabulatedMask) and known.holds(problem.queries, *problem.lengths):
        return replace(problem, mask=known)
    return replace(problem, mask=tabulated(comm, problem.mask, problem.queries, *problem.lengths))


def tabulated(
    comm: Communicator, mask: UserMask, queries: Positions, query_tokens: int, key_tokens: int
) -> TabulatedMask:
    """Return a user's mask as numbers, the same on all ranks, or raise the same InputError on all; one collective."""
    from hashlib import sha256  # with it comes OpenSSL: 4 MB, which few need

    table, own = None, ""
    try:
        table = mask.tabulated(queries, query_tokens, key_tokens)
        own = sha256(table.lo + table.hi).hexdigest()
    except InputError as error:
        own = str(error)
    answers = comm.allgather((table is not None, own))
    for rank, (works, text) in enumerate(answers):
        if not works:
            raise InputError(text)
        if text != answers[0][1]:
            raise InputError(f"the mask {mask!r} on rank {rank} has other bounds than on rank 0")
    assert table is not None
    return table
