"""Scores of a tile and their weights in the softmax, in place.

Scores are kept in log2 and in the accumulators' dtype, where these are precise enough for them: rounded to float32,
one of 20,000 is off by 1e-3, and so is the probability that backward finds by it, once more and otherwise. Larger
ones are raw: float64, natural, and their shifts are subtracted from what is otherwise the same number forward and
backward. See `form_of`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiattn.arrays import accumulator

from . import slices

Array = NDArray[Any]

LOG2E = math.log2(math.e)
LN2 = math.log(2)

# Scores below FLOOR from their row's shift count as FLOOR: far below rounding, and far above
# the denormal numbers, which cost a matrix product 100 times its time. (Keyed by bytes per number.)
FLOOR = {4: -64.0, 8: -128.0}
SAFE = 60.0  # scores in log2 within +-SAFE need no shift: 2**60 and its sums are well inside float32
SLACK = 16.0  # how far a score may exceed its row's shift before the shift is raised

LARGE = {4: 2.0**8, 8: 2.0**24}  # scores up to here are known to 1e-5 in float32, to 1e-8 in float64
STEEP = LARGE[8]  # beyond, raw scores are products of slices


class Form(NamedTuple):
    """The way in which scores are computed.

    Attributes
    ----------
    dtype : float32 or float64
    softcap : float, optional
    raw : bool
        Whether scores are natural, and without a shift: else they are in log2, less the shift.
    sliced : bool
        Whether their product is one of slices.
    bound, longest_key : float
        The most that a natural score can be, and the norm of a key.
    """

    dtype: np.dtype[Any]
    softcap: float | None = None
    raw: bool = False
    sliced: bool = False
    bound: float = math.inf
    longest_key: float = math.inf

    @property
    def unit(self) -> float:
        """Factor of the product of a scaled query and a key."""
        return 1 / self.softcap if self.softcap else 1 if self.raw else LOG2E

    @property
    def whole(self) -> bool:
        """Whether that product holds the shift, too."""
        return not self.softcap and not self.raw

    def key_factor(self, keys: Array) -> Array:
        """Return the left factor of a product of scores, of keys with a column of ones."""
        return slices.cut(keys[:, :-1]) if self.sliced else keys if self.whole else keys[:, :-1]

    def query_factor(self, query: Array) -> Array:
        """Return the right factor, of queries with a row of shifts: a view, where it holds these."""
        return slices.reversed_columns(query[:-1].T) if self.sliced else query if self.whole else query[:-1]

    def exp(self, array: Array, out: Array | None = None) -> Array:
        """Return the weights of scores."""
        return (np.exp if self.raw else np.exp2)(array, out=out)

    def safe(self, query: Array) -> bool:
        """Return whether the scores of a row of tiles need no shift."""
        bound = self.bound
        if not self.raw and not bound * LOG2E < SAFE:
            bound = self.longest_key * longest(query[:-1].T) / self.unit
            bound = min(bound, self.softcap or bound)  # in this order: NaN stays
        return not self.raw and bound * LOG2E < SAFE

    def lse(self, weight: Array, shift: Array) -> Array:
        """Return the natural lse, float64, of sums of weights, and shifts as a query's last row holds them."""
        if self.raw:
            return np.log(weight) - shift
        return LN2 * (np.log2(weight, dtype=np.float64) - shift)

    def shift(self, lse: Array) -> Array:
        """Return the shifts, negated, with which weights are probabilities; where there are none, a finite one."""
        most = float(np.finfo(self.dtype).max) / 4
        shift = np.multiply(lse, -1 if self.raw else -LOG2E, dtype=np.float64)
        return np.where(np.isneginf(lse), -most, np.clip(shift, -most, most))


def form_of(queries: Array, keys: Array, scale: float, softcap: float | None, dtype: np.dtype[Any]) -> Form:
    """Return how scores of some queries and keys, (..., dim), are to be computed, and what is made of them."""
    longest_query, longest_key = longest(queries) * abs(scale), longest(keys)
    bound, most = longest_query * longest_key, float(np.finfo(dtype).max) ** 0.75
    if bound <= LARGE[dtype.itemsize] and longest_query < most and (not scale or 1 / most < abs(scale) < most):
        return Form(dtype, softcap, bound=bound, longest_key=longest_key)
    return Form(np.dtype(np.float64), softcap, raw=True, sliced=not bound <= STEEP)  # also where one is NaN


def shift(score: Array, query: Array, total: Array, visible: Array | None) -> None:
    """Move the rows' shifts (query's last row, negated) so that no score exceeds its shift by much.

    The online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), except that a shift stays
    until a score exceeds it by SLACK: any shift near the maximum gives the same result.
    """
    fresh = total[-1] == 0  # no keys so far: the shift means nothing yet and may move either way
    if not fresh.any() and score.max() <= SLACK:  # with what is hidden: to leave that out takes longer
        return
    if visible is not None:
        np.copyto(score, -np.inf, where=~visible)
    rise = score.max(axis=0)
    rise = np.where(fresh & ~np.isneginf(rise), rise, np.maximum(rise, 0))
    score -= rise
    query[-1] -= rise
    total *= np.exp2(-np.maximum(rise, 0))


def shift_raw(score: Array, query: Array, total: Array, visible: Array | None) -> None:
    """Make the rows' shifts (query's last row, negated) the largest raw scores so far, and subtract them.

    They are these to the last bit: of numbers of 10**20, differences of sums would be off by thousands.
    """
    if visible is not None:
        np.copyto(score, -np.inf, where=~visible)
    fresh = total[-1] == 0
    top = score.max(axis=0)
    top = np.where(fresh, top, np.maximum(top, -query[-1]))
    top[np.isneginf(top)] = 0  # sees nothing so far
    total *= np.exp(np.where(fresh, 0, -query[-1] - top))
    score -= top
    query[-1] = -top


def weigh(score: Array, form: Form, visible: Array | None, bounded: bool = False, top: float | None = None) -> None:
    """Replace scores by their weights, exactly zero where not visible.

    Parameters
    ----------
    score : (keys, queries)
        Less the shifts.
    form : Form
    visible : bool, (keys, queries), optional
    bounded : bool
        Whether scores are known to be within +-SAFE.
    top : float, optional
        What scores count as that are more, by rounding; without it, none is more by much.
    """
    if not bounded:
        floor = FLOOR[score.itemsize]
        if not (score.min() >= floor and (top is None or score.max() <= top)):
            np.clip(score, floor, top, out=score)
    form.exp(score, out=score)
    if visible is not None:
        score *= visible


def longest(rows: Array) -> float:
    """Return the largest Euclidean norm of the rows, (..., dim); NaN where there is one."""
    rows = rows.astype(accumulator(rows.dtype), copy=False)
    square = float(np.einsum("...d,...d->...", rows, rows).max(initial=0))
    if 1e-30 < square < math.inf:
        return math.sqrt(square)
    largest = max(float(rows.max(initial=0)), -float(rows.min(initial=0)))
    if not 0 < largest < math.inf:
        return largest
    rows = rows / largest  # so that no square overflows, and the largest does not vanish
    return largest * math.sqrt(np.einsum("...d,...d->...", rows, rows).max(initial=0))
