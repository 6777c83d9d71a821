"""The oracle: textbook attention in float64 with every score written out, forward and backward.

It shares no code with the kernels or the algorithms, so that agreement means something. Queries are
taken in slabs only to bound memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mask import Mask, Positions, allowed

Array = NDArray[Any]
SLAB = 512

TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of an exact algorithm, relative to the largest value, by the dtype of its input and output."""


def error(result: Array, reference: Array) -> float:
    """Return the largest difference relative to the largest value of the reference; NaN where there is one."""
    difference = np.abs(result - reference).max(initial=0)
    return float(difference / (np.abs(reference).max(initial=0) or 1))


def attention(
    q: Array, k: Array, v: Array, mask: Mask, scale: float | None = None, queries: Positions | None = None
) -> tuple[Array, Array]:
    """Return out and lse of the given queries, in float64.

    Parameters
    ----------
    q, k, v : (batch, heads, tokens, head_dim)
        The whole sequences, any float dtype; K and V may have fewer heads.
    mask : Mask
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) by default.
    queries : int64, optional
        Positions of the queries that are wanted; all by default.

    Returns
    -------
    out : float64, (batch, heads, queries, v_head_dim)
    lse : float64, (batch, heads, queries)
    """
    queries = np.arange(q.shape[2]) if queries is None else queries
    out = np.zeros((*q.shape[:2], len(queries), v.shape[3]))
    lse = np.full((*q.shape[:2], len(queries)), -np.inf)
    for b, h, part, p, score_lse in _probabilities(q, k, mask, scale, queries):
        out[b, h, part] = p @ v[b, h * v.shape[1] // q.shape[1]].astype(np.float64)
        lse[b, h, part] = score_lse
    return out, lse


def gradients(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    mask: Mask,
    scale: float | None = None,
    queries: Positions | None = None,
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
    for b, h, part, p, _ in _probabilities(q, k, mask, scale, queries):
        kv = h * k.shape[1] // q.shape[1]
        gradient = d_out[b, h, part].astype(np.float64)
        d_p = gradient @ v[b, kv].astype(np.float64).T
        d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) * factor
        d_v[b, kv] += p.T @ gradient
        d_q[b, h, part] = d_s @ k[b, kv].astype(np.float64)
        d_k[b, kv] += d_s.T @ q[b, h, queries[part]].astype(np.float64)
    return d_q, d_k, d_v


def _probabilities(q: Array, k: Array, mask: Mask, scale: float | None, queries: Positions) -> Any:
    """Yield (batch, head, slice of queries, probabilities, lse) for each head and slab of queries."""
    factor = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    keys = np.arange(k.shape[2])
    for start in range(0, len(queries), SLAB):
        part = slice(start, start + SLAB)
        visible = allowed(mask, queries[part], keys)
        for b, h in np.ndindex(*q.shape[:2]):
            kv = h * k.shape[1] // q.shape[1]
            scores = q[b, h, queries[part]].astype(np.float64) @ k[b, kv].astype(np.float64).T * factor
            scores[~visible] = -np.inf
            top = scores.max(axis=1, initial=-np.inf)
            weights = np.exp(scores - np.where(np.isneginf(top), 0, top)[:, None])
            total = weights.sum(axis=1)
            probabilities = weights / np.where(total == 0, 1, total)[:, None]
            with np.errstate(divide="ignore"):
                yield b, h, part, probabilities, np.log(total) + np.where(np.isneginf(top), 0, top)
