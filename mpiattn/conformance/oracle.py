"""The oracle: textbook attention in float64 with every score written out, forward and backward.

It shares no code with the kernels or the algorithms, so that agreement means something: which keys a query sees is
worked out anew (`visible`), and so is which probabilities dropout keeps (`dropped`). Queries are taken in slabs only
to bound memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from .dropped import kept
from .visible import Visible, visible

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..problems.dropout import Dropout
    from ..problems.mask import Mask, Positions

Array = NDArray[Any]
SLAB = 512

TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of an exact algorithm, relative to the largest value, by the dtype of its input and output."""


def error(result: Array, reference: Array, least: float = 0) -> float:
    """Return the largest difference relative to the largest value of the reference, or to `least`; may be NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(result - reference).max(initial=0)
    return float(difference / (max(np.abs(reference).max(initial=0), least) or 1))


class Features(TypedDict, total=False):
    """Further features of attention: see `algorithms.base.Attention`; sinks are of all heads."""

    softcap: float | None
    dropout: Dropout | None
    sinks: Array | None


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | Visible,
    scale: float | None = None,
    queries: Positions | None = None,
    **features: Unpack[Features],
) -> tuple[Array, Array]:
    """Return out and lse of the given queries, in float64.

    Parameters
    ----------
    q, k, v : (batch, heads, tokens, head_dim)
        The whole sequences, any float dtype; K and V may have fewer heads.
    mask : Mask, or bool, (query tokens, key tokens)
        An array says which keys each query sees.
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) by default.
    queries : int64, optional
        Positions of the queries that are wanted; all by default.
    features
        See `Features`.

    Returns
    -------
    out : float64, (batch, heads, queries, v_head_dim)
    lse : float64, (batch, heads, queries)
    """
    queries = np.arange(q.shape[2]) if queries is None else queries
    out = np.zeros((*q.shape[:2], len(queries), v.shape[3]))
    lse = np.full((*q.shape[:2], len(queries)), -np.inf)
    for slab in _slabs(q, k, mask, scale, queries, **features):
        out[slab.place] = (slab.p * slab.kept) @ v[slab.kv].astype(np.float64)
        lse[slab.place] = slab.lse
    return out, lse


def gradients(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    mask: Mask | Visible,
    scale: float | None = None,
    queries: Positions | None = None,
    **features: Unpack[Features],
) -> tuple[Array, Array, Array]:
    """Return d_q of the given queries, and what they contribute to d_k and d_v, in float64.

    Parameters
    ----------
    d_out : (batch, heads, queries, v_head_dim)
        Gradient of the output at the given queries.
    """
    queries = np.arange(q.shape[2]) if queries is None else queries
    factor = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    d_q = np.zeros((*q.shape[:2], len(queries), q.shape[3]))
    d_k, d_v = np.zeros(k.shape), np.zeros(v.shape)
    for slab in _slabs(q, k, mask, scale, queries, **features):
        p, gradient = slab.p, d_out[slab.place].astype(np.float64)
        d_p = gradient @ v[slab.kv].astype(np.float64).T * slab.kept
        d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) * slab.slope * factor
        d_v[slab.kv] += (p * slab.kept).T @ gradient
        d_q[slab.place] = d_s @ k[slab.kv].astype(np.float64)
        b, h, part = slab.place
        d_k[slab.kv] += d_s.T @ q[b, h, queries[part]].astype(np.float64)
    return d_q, d_k, d_v


def sink_gradient(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    mask: Mask | Visible,
    scale: float | None = None,
    queries: Positions | None = None,
    **features: Unpack[Features],
) -> Array:
    """Return what the given queries contribute to the gradient of the sinks: float64, (heads,)."""
    queries = np.arange(q.shape[2]) if queries is None else queries
    result = np.zeros(q.shape[1])
    for slab in _slabs(q, k, mask, scale, queries, **features):
        d_p = d_out[slab.place].astype(np.float64) @ v[slab.kv].astype(np.float64).T * slab.kept
        # The softmax's gradient in the sink's column, whose own d_p is zero: nothing is attended to there.
        result[slab.place[1]] += (slab.sink * (0 - (slab.p * d_p).sum(axis=1))).sum()
    return result


class Slab(NamedTuple):
    """Some queries of one head against all keys.

    Attributes
    ----------
    place : batch, head, slice of the queries
    kv : batch, K/V head
    p : (queries, keys)
        Probabilities, none of them dropped.
    sink : (queries,)
        Probability of the sink; 0 without one.
    kept : (queries, keys) or float
        What dropout multiplies probabilities by.
    slope : (queries, keys) or float
        Derivative of the softcap.
    lse : (queries,)
    """

    place: tuple[int, int, slice]
    kv: tuple[int, int]
    p: Array
    sink: Array
    kept: Array | float
    slope: Array | float
    lse: Array


def _slabs(
    q: Array, k: Array, mask: Mask | Visible, scale: float | None, queries: Positions, softcap: float | None = None,
    dropout: Dropout | None = None, sinks: Array | None = None,
) -> Iterator[Slab]:  # fmt: skip
    """Yield the probabilities of each head and slab of queries."""
    factor = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    keys = np.arange(k.shape[2])
    for start in range(0, len(queries), SLAB):
        part = slice(start, start + SLAB)
        seen = visible(mask, queries[part], keys)
        for b, h in np.ndindex(*q.shape[:2]):
            kv = b, h * k.shape[1] // q.shape[1]
            scores = q[b, h, queries[part]].astype(np.float64) @ k[kv].astype(np.float64).T * factor
            slope: Array | float = 1.0
            if softcap is not None:
                slope = 1 / np.cosh(np.clip(scores / softcap, -300, 300)) ** 2
                scores = softcap * np.tanh(scores / softcap)
            scores[~seen] = -np.inf
            sink = np.full((len(scores), 1), -np.inf if sinks is None else float(sinks[h]))
            scores = np.concatenate([scores, sink], axis=1)
            top = scores.max(axis=1)
            weights = np.exp(scores - np.where(np.isneginf(top), 0, top)[:, None])
            total = weights.sum(axis=1)
            probabilities = weights / np.where(total == 0, 1, total)[:, None]
            factors: Array | float = 1.0
            if dropout is not None:
                factors = kept(dropout.rate, dropout.seed, b, h, queries[part], keys) / (1 - dropout.rate)
            with np.errstate(divide="ignore"):
                lse = np.log(total) + np.where(np.isneginf(top), 0, top)
            yield Slab((b, h, part), kv, probabilities[:, :-1], probabilities[:, -1], factors, slope, lse)
