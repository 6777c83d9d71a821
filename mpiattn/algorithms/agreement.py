"""The problem that the ranks' arrays pose together, or what is wrong with them.

Each describes what it was given in integers, one collective brings all of them to every rank, and functions of
them alone, here, say what fits. So every rank says the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..errors import InputError
from ..messages.message import Communicator
from ..problems.layout import EVERYWHERE
from ..problems.mask import Mask, Positions
from ..problems.problem import Problem
from ..problems.user_mask import TabulatedMask, UserMask

T = TypeVar("T")


class Agreement:
    """What the ranks of a communicator tell each other before the first message of a pass."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.last: tuple[bytes, Problem] | None = None
        self.batch: object = None
        self.told: dict[bytes, NDArray[np.int64]] = {}
        """What all ranks said when this one said the same of the same batch; see `trust`."""

    def trust(self, batch: object) -> None:
        """Ask each thing once for a batch, or with None each time.

        For who has agreed on all that decides what each rank will say of it: the ranks then need the same answers at
        the same time.
        """
        if batch is not self.batch:
            self.batch, self.told = batch, {}

    def describe(self, *values: object, numbers: Sequence[int] = ()) -> NDArray[np.int64]:
        """Return the descriptions of every array of every rank, and behind them its numbers: a row for each rank."""
        own = np.concatenate([*map(arrays.describe, values), np.array(numbers, np.int64)])
        known = self.told.get(own.tobytes())
        if known is not None:
            return known
        everything = np.empty((self.comm.Get_size(), len(own)), np.int64)
        self.comm.Allgather(own, everything)
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
                    raise InputError(
                        f"{name} on rank {rank} is {text}. Arrays are NumPy's or CuPy's, of "
                        f"{', '.join(d.name for d in arrays.FLOATS)}"
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

    def once(self, descriptions: bytes, pose: Callable[[bytes], Problem]) -> Problem:
        """Return the problem that the ranks' arrays pose, made anew where they aren't described as the last ones."""
        if self.last is None or descriptions != self.last[0]:
            self.last = None
            self.last = descriptions, pose(descriptions)
        return self.last[1]


# The same descriptions give the same objects: ranks of one process (`virtual`) share what they work out.


@functools.lru_cache(maxsize=16)
def posed(descriptions: bytes, ranks: int, layout_name: str, mask: Mask, partials: str) -> Problem:
    """Return the problem that all ranks' q, k, v pose; errors as `agreed`."""
    return replace(agreed(described(descriptions, ranks, 3), layout_name, mask), partials=partials)


@functools.lru_cache(maxsize=16)
def described(descriptions: bytes, ranks: int, values: int) -> list[list[arrays.Spec | None]]:
    """Return shape and dtype of every array of every rank; the numbers behind them must be the same on all."""
    everything = np.frombuffer(descriptions, np.int64).reshape(ranks, -1)
    table, others = np.split(everything, [values * arrays.DESCRIPTION], axis=1)
    table = table.reshape(-1, values, arrays.DESCRIPTION)
    for rank, row in enumerate(others):
        if (row != others[0]).any():
            raise InputError(f"rank {rank} gave what was saved by another forward than on rank 0")
    for rank, kinds in enumerate(table[:, :, 0]):
        if len(present := {arrays.NAMESPACES[kind] for kind in (*kinds, table[0, 0, 0]) if kind >= 0}) > 1:
            raise InputError(f"rank {rank} mixes {' and '.join(sorted(present))} arrays, or has others than rank 0")
        if arrays.ELSEWHERE in present:
            raise InputError(f"rank {rank} has arrays on another GPU than its current one: see mpiattn.use_gpu")
    return [[arrays.described(description) for description in row] for row in table]


def agreed(table: Sequence[Sequence[arrays.Spec | None]], layout_name: str, mask: Mask) -> Problem:
    """Return the problem that the ranks' q, k, v pose together, or raise InputError.

    It sees the same table on every rank, so it says the same on every rank.

    Parameters
    ----------
    table : for each rank, (shape, dtype) of q, k and v
    """
    spread, axis = ("heads", 1) if layout_name == EVERYWHERE else ("tokens", 2)
    fit_together(table, spread, axis)
    shapes = [[spec[0] for spec in row if spec is not None] for row in table]
    [dtype] = {spec[1] for row in table for spec in row if spec is not None}
    batch, heads, q_tokens, head_dim = (
        sum(q[i] for q, _, _ in shapes) if i == axis else length for i, length in enumerate(shapes[0][0])
    )
    _, kv_heads, kv_tokens, _ = (
        sum(k[i] for _, k, _ in shapes) if i == axis else length for i, length in enumerate(shapes[0][1])
    )
    sizes = batch, heads, kv_heads, head_dim, shapes[0][2][3], q_tokens, kv_tokens
    spread_heads = tuple((q[1], k[1]) for q, k, _ in shapes) if axis == 1 else ()
    problem = Problem(len(table), *sizes, np.dtype(dtype), layout_name, mask, spread_heads=spread_heads)
    both = (("q", q_tokens, problem.q_positions), ("k", kv_tokens, problem.kv_positions))
    for index, (name, tokens, positions) in enumerate(both):
        for rank, row_shapes in enumerate(shapes):
            if (count := row_shapes[index][2]) != len(positions[rank]):
                raise InputError(
                    f"{name} on rank {rank} has {count} tokens; the {layout_name} layout of {tokens} tokens "
                    f"over {len(table)} ranks gives it {len(positions[rank])}: cut with "
                    f"positions({tokens}) or scatter()"
                )
    try:
        mask.check(q_tokens, kv_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None
    return problem


def fit_together(table: Sequence[Sequence[arrays.Spec | None]], spread: str = "tokens", axis: int = 2) -> None:
    """Raise InputError where the ranks' q, k, v do not fit together, wherever what is spread over ranks lies."""
    for rank, row in enumerate(table):
        for name, spec in zip("qkv", row, strict=True):
            if spec is None or len(spec[0]) != 4 or spec[1] not in arrays.FLOATS:
                raise InputError(
                    f"{name} on rank {rank} is {show(spec)}; it must be an array of 4 axes (batch, heads, "
                    f"tokens, head_dim) of {', '.join(d.name for d in arrays.FLOATS)}"
                )
    for rank, row in enumerate(table):
        for name, spec, first in zip("qkv", row, table[0], strict=True):
            if _without(axis, spec) != _without(axis, first):
                raise InputError(
                    f"{name} on rank {rank} is {show(spec)}, on rank 0 {show(first)}: "
                    f"only the number of {spread} may differ between ranks"
                )
        (q, q_dtype), (k, k_dtype), (v, v_dtype) = (spec for spec in row if spec is not None)
        where = f"on rank {rank}, q is {show(row[0])}, k {show(row[1])}, v {show(row[2])}: "
        if not q_dtype == k_dtype == v_dtype:
            raise InputError(where + "they must have one dtype")
        if not q[0] == k[0] == v[0]:
            raise InputError(where + "they must have one batch size")
        if k[1:3] != v[1:3]:
            raise InputError(where + "k and v must have the same heads and tokens")
        if q[3] != k[3] or q[3] < 1 or v[3] < 1:
            raise InputError(where + "q and k must have the same head_dim, at least 1, and v at least 1")
        none = axis == 1 and q[1] == k[1] == 0
        if not none and (k[1] < 1 or q[1] % k[1]):
            legal = [heads for heads in range(1, q[1] + 1) if q[1] % heads == 0]
            raise InputError(where + f"the {q[1]} heads of q need k and v with one of {legal} heads")


def _without(axis: int, spec: arrays.Spec | None) -> Any:
    return spec and (spec[0][:axis], spec[0][axis + 1 :], spec[1])


def show(spec: arrays.Spec | None) -> str:
    """Return a dtype and shape as text."""
    return "no array that can be sent" if spec is None else f"{np.dtype(spec[1]).name} {spec[0]}"


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
    table, own = None, ""
    try:
        table = mask.tabulated(queries, query_tokens, key_tokens)
        own = hashlib.sha256(table.lo + table.hi).hexdigest()
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
