"""Where a result of one rank differs from what is right, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..problems.mask import Positions
from . import oracle

MOST = 3
"""Runs of wrong tokens that are told; the rest is counted."""


def compare(
    name: str, result: Array, reference: Array, whole: Array, dtype: str, least: float = 0,
    tokens: Positions | None = None,
) -> list[str]:  # fmt: skip
    """Return what is wrong with one rank's share of a result, in no or one text.

    Parameters
    ----------
    name : str
        out, lse, d_q, d_k, d_v, or d_sinks.
    result, reference : (batch, heads, tokens, head_dim), or less
        The share as it is, and as it should be.
    whole : array
        What is right on all ranks: errors are relative to its largest value, or to `least`.
    dtype : str
        Of the case, by whose tolerance it is judged.
    tokens : int64, optional
        Global positions of the share's tokens, by which wrong ones are named.
    """
    if result.shape != reference.shape:
        return [f"{name} is {result.shape} instead of {reference.shape}"]
    if name not in ("lse", "d_sinks") and result.dtype.name != dtype:
        return [f"{name} is {result.dtype} instead of {dtype}"]
    if name == "lse":  # -inf where a query attends to nothing
        infinite = np.isneginf(result) != np.isneginf(reference)
        if infinite.any():
            return [f"lse is -inf elsewhere than it should be{places(name, infinite, result, reference, tokens)}"]
        result, reference, whole = (np.where(np.isneginf(array), 0, array) for array in (result, reference, whole))
    tolerance, largest = oracle.TOLERANCES[dtype], max(np.abs(whole).max(initial=0), least) or 1
    with np.errstate(invalid="ignore"):  # an infinite result is wrong, and no more
        error = np.abs(result.astype(np.float64) - reference) / largest
    wrong = ~(error <= tolerance)  # also where it is not a number
    if not wrong.any():
        return []
    said = f"error of {name} {error.max(initial=0):.1e} exceeds {tolerance:.0e}"
    return [said + places(name, wrong, result, reference, tokens)]


def matches(result: Array, candidate: Array, dtype: str, least: float = 0) -> bool:
    """Say whether a result is, within the tolerance, what another computation gives."""
    finite = np.where(np.isneginf(candidate), 0, candidate)
    largest = max(np.abs(finite).max(initial=0), least) or 1
    with np.errstate(invalid="ignore"):
        error = np.abs(np.where(np.isneginf(result), 0, result).astype(np.float64) - finite)
    return bool((error <= oracle.TOLERANCES[dtype] * largest).all())


def places(name: str, wrong: NDArray[np.bool_], result: Array, reference: Array, tokens: Positions | None) -> str:
    """Return which tokens and heads are wrong, and the first wrong number."""
    first = tuple(int(index[0]) for index in np.nonzero(wrong))
    number = (
        f"{name}[{', '.join(map(str, first))}] is {float(result[first]):.6g}, right is {float(reference[first]):.6g}"
    )
    if tokens is None or wrong.ndim < 3:
        return f"\n    first {number}"
    rest: tuple[Any, ...] = tuple(range(3, wrong.ndim))
    local, heads = np.any(wrong, axis=(0, 1, *rest)), np.any(wrong, axis=(0, 2, *rest))
    whose = "all" if local.all() else f"{local.sum()} of its {len(local)}"
    of_heads = "" if heads.all() else f", heads {runs(np.flatnonzero(heads))}"
    return f"\n    tokens {runs(tokens[local])} ({whose}){of_heads}; first, of token {tokens[first[2]]}: {number}"


def runs(numbers: Sequence[int] | Array) -> str:
    """Return ascending numbers as text, those in a row together."""
    if not len(numbers):
        return "none"
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    texts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(texts[:MOST]) + (f" and {len(texts) - MOST} more" if len(texts) > MOST else "")


def cancelling(
    given: Mapping[str, Array], scale: float | None, dropout: float, part: float = 1 / 8
) -> dict[str, float]:
    """Return a part of the largest that the terms can be whose differences make a gradient.

    An error is relative to no less: where the terms cancel, as they do for a query that sees one key, their
    rounding is left, half an eps of `out` that `delta` is made of, which 1/256 keeps below the tolerances.
    """
    q, k, v, d_out = (
        np.linalg.norm(given[name].astype(np.float64), axis=-1).max(initial=0) for name in (*"qkv", "out")
    )
    factor = given["q"].shape[-1] ** -0.5 if scale is None else abs(scale)
    d_p = d_out * v / (1 - dropout) * part
    # What an error of lse does to probabilities depends on its size, not on that of lse.
    return {"lse": 1.0, "d_q": d_p * factor * k, "d_k": d_p * factor * q, "d_sinks": d_p}
