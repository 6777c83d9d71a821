"""Operations on NumPy's arrays, and on arrays without data; see `operations`."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from . import Array, accumulator
from .places import Places

QUEUED = False


def on_host(array: Array) -> Array:
    """Return the array."""
    result: Array = array
    return result


def copy(place: Array, array: Array) -> None:
    """Copy numbers."""
    place[...] = array


def cast(array: Array, dtype: DTypeLike) -> Array:
    """Return an array rounded to a dtype."""
    return array.astype(dtype)


def add(total: Array, share: Array) -> None:
    """Add an array to a sum."""
    total += share


def take(array: Array, places: Places) -> Array:
    """Return array[:, :, places]."""
    return array[:, :, places.indices]


def put(array: Array, places: Places, part: Array) -> None:
    """Set array[:, :, places] to a part."""
    array[:, :, places.indices] = part


def merge(out: Array, lse: Array, other_out: Array, other_lse: Array) -> None:
    """Merge another partial result: see `softmax.merge`."""
    if lse.max(initial=-np.inf) == -np.inf:  # the neutral state: as a row's first block finds it
        out[...] = other_out
        lse[...] = other_lse
        return
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odds = np.exp(other_lse - lse)
        odds[np.isneginf(other_lse)] = 0  # where both are empty, -inf - -inf made NaN
        # Not exp(lse_i - lse): these sum to 1 whatever lse was rounded to, merge after merge.
        weight, other_weight = ((1 / (1 + x)).astype(out.dtype) for x in (odds, 1 / odds))
        total = np.logaddexp(lse, other_lse)
    # Head by head, so that the passes over (tokens, head_dim) stay in the cache.
    for head in np.ndindex(lse.shape[:-1]):
        out[head] *= weight[head][:, None]
        out[head] += other_weight[head][:, None] * other_out[head]
    lse[...] = total


def delta(d_out: Array, out: Array) -> Array:
    """Return rowsum(d_out * out)."""
    result: Array = np.einsum("...td,...td->...t", d_out, out, dtype=accumulator(d_out.dtype))
    return result
