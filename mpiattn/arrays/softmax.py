"""The online-softmax state (out, lse) and its merge: the one place where partial attention is combined.

Attention of the same queries over two disjoint sets of keys, each normalised on its own and with the
natural logarithm of its sum of exponentials, combines exactly (Milakov and Gimelshein 2018,
arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682):

    lse = logaddexp(lse_1, lse_2)
    out = exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2

The neutral state is out = 0, lse = -inf, which is also the answer for a query that attends to nothing.
"""

from __future__ import annotations

import numpy as np

from . import Array, namespace
from .operations import operations

LSE = np.dtype(np.float64)
"""Dtype of an lse, one number a row, wherever it is kept or sent. In float32 one of 20,000 would be known to 1e-3 only,
and with it the probabilities that backward finds by it; and errors would grow with the number of blocks merged."""


def merge(out: Array, lse: Array, other_out: Array, other_lse: Array) -> None:
    """Merge another partial result of the same queries into (out, lse), in place.

    Parameters
    ----------
    out, other_out : float32 or float64, (..., tokens, head_dim)
        Normalised partial outputs.
    lse, other_lse : float64, (..., tokens)
        Natural logarithms of their sums; -inf where a query has attended to nothing.
    """
    operations(out).merge(out, lse, other_out, other_lse)


def delta(d_out: Array, out: Array) -> Array:
    """Return rowsum(d_out * out), (..., tokens): what the softmax's backward subtracts from d_P.

    The owner of the queries computes it once, so that out itself need not travel.
    """
    return operations(d_out).delta(d_out, out)


def weighted(out: Array, lse: Array, top: Array) -> Array:
    """Return what an all-reduce can add up: exp(lse - top) * out, and behind it exp(lse - top).

    Parameters
    ----------
    out, lse : as in `merge`
        A partial result.
    top : as lse
        The largest lse of all partial results of the same queries.

    Returns
    -------
    (..., tokens, head_dim + 1)
    """
    xp = namespace(out)
    result: Array = xp.empty((*out.shape[:-1], out.shape[-1] + 1), out.dtype)
    weight = xp.exp(lse - xp.where(xp.isneginf(top), 0, top))  # where all are empty, -inf - -inf would make NaN
    result[..., :-1], result[..., -1] = out, weight
    result[..., :-1] *= weight[..., None]
    return result


def normalised(sums: Array, top: Array) -> tuple[Array, Array]:
    """Return (out, lse) from the sum of all that `weighted` returned for the same top; out is in the same memory."""
    xp = namespace(sums)
    empty = xp.isneginf(top)
    out, total = sums[..., :-1], xp.where(empty, 1, sums[..., -1])
    out /= total[..., None]
    return out, xp.where(empty, top, top + xp.log(total))


def with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Return (out, lse) with one more logit in each query's softmax, at which there is nothing to attend to.

    A query that attends to no key has out = 0 and the sink as its lse.

    Parameters
    ----------
    out, lse : as in `merge`
        Complete results.
    sinks : (heads,)
        The logit of each head.
    """
    xp = namespace(out)
    total = xp.logaddexp(lse, sinks.astype(lse.dtype)[:, None])
    weight = xp.exp(lse - xp.where(xp.isneginf(total), 0, total))
    return out * weight.astype(out.dtype)[..., None], total


def sink_gradient(sinks: Array, lse: Array, delta: Array) -> Array:
    """Return what some queries contribute to the gradient of the sinks, (heads,), in the dtype of delta.

    Parameters
    ----------
    sinks : (heads,)
    lse, delta : (batch, heads, tokens)
        Final ones, the sinks included.
    """
    xp = namespace(lse)
    probability = xp.exp(sinks.astype(lse.dtype)[:, None] - xp.where(xp.isneginf(lse), 0, lse))
    return -(probability * delta).sum(axis=(0, 2)).astype(delta.dtype)  # type: ignore[no-any-return]
