"""The problem that the ranks' arrays pose together, or what is wrong with them: functions of their descriptions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..errors import InputError
from ..problems.layout import EVERYWHERE
from ..problems.mask import Mask
from ..problems.problem import Problem
from .given import agreed_given

# The same descriptions give the same objects: ranks of one process (`virtual`) share what they work out.


@functools.lru_cache(maxsize=16)
def posed(table: bytes, ranks: int, layout_name: str, mask: Mask, partials: str) -> Problem:
    """Return the problem that all ranks' q, k, v pose, which agree on the rest; errors as `agreed` and `agreed_given`.

    Parameters
    ----------
    table : for each rank, the descriptions of q, k and v, and what `numbered` returned
    """
    rows = np.frombuffer(table, np.int64).reshape(ranks, -1)
    descriptions, others = np.split(rows, [3 * arrays.DESCRIPTION], axis=1)
    problem = _posed(descriptions.tobytes(), ranks, layout_name, mask, partials)
    agreed_given(others.tolist(), alike=layout_name != EVERYWHERE)
    return problem


@functools.lru_cache(maxsize=16)
def _posed(descriptions: bytes, ranks: int, layout_name: str, mask: Mask, partials: str) -> Problem:
    """Return the problem alone: the same one where only what is given beside q, k, v is another."""
    return replace(agreed(described(descriptions, ranks, 3), layout_name, mask), partials=partials)


@functools.lru_cache(maxsize=16)
def described(descriptions: bytes, ranks: int, values: int) -> list[list[arrays.Spec | None]]:
    """Return shape and dtype of every array of every rank; the numbers behind them must be the same on all."""
    everything = np.frombuffer(descriptions, np.int64).reshape(ranks, -1)
    table, others = np.split(everything, [values * arrays.DESCRIPTION], axis=1)
    table = table.reshape(-1, values, arrays.DESCRIPTION)
    same_forward(others)
    for rank, kinds in enumerate(table[:, :, 0]):
        if len(present := {arrays.NAMESPACES[kind] for kind in (*kinds, table[0, 0, 0]) if kind >= 0}) > 1:
            raise InputError(f"rank {rank} mixes {' and '.join(sorted(present))} arrays, or has others than rank 0")
        if arrays.ELSEWHERE in present:
            raise InputError(f"rank {rank} has arrays on another GPU than its current one: see mpiattn.use_gpu")
    return [[arrays.described(description) for description in row] for row in table]


def same_forward(numbers: NDArray[np.int64]) -> None:
    """Raise InputError where what the ranks say of the forward that saved, a row each, differs."""
    for rank in np.flatnonzero((numbers != numbers[0]).any(axis=1)):
        raise InputError(f"rank {rank} gave what was saved by another forward than on rank 0")


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
                    f"tokens, head_dim) of {', '.join(arrays.FLOAT_NAMES)}"
                )
    for rank, row in enumerate(table):
        for name, spec, first in zip("qkv", row, table[0], strict=True):
            if _without(axis, spec) != _without(axis, first):
                raise InputError(
                    f"{name} on rank {rank} is {show(spec)}, on rank 0 {show(first)}: "
                    f"only the number of {spread} may differ between ranks"
                )
        fit([spec for spec in row if spec is not None], f"on rank {rank}, ", axis)


def fit(specs: Sequence[arrays.Spec], where: str, axis: int = 2) -> None:
    """Raise InputError where a q, k and v of 4 axes do not fit together; its text begins with where they are."""
    (q, q_dtype), (k, k_dtype), (v, v_dtype) = specs
    where += f"q is {show(specs[0])}, k {show(specs[1])}, v {show(specs[2])}: "
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
