"""The layers of a transformer, forward and backward, as functions of arrays.

Forward returns the output alone; backward takes the gradient of the output and what forward was given, and returns
the gradients of these in the same order. NumPy and CuPy arrays go through the same operations. Activations are
(batch, tokens, features), b, t and f below; sums along a row are float32 or wider.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import Array, accumulator, namespace

GELU = math.sqrt(2 / math.pi), 0.044715
LOG2E = math.log2(math.e)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return x W^T + bias: (b, t, out).

    Parameters
    ----------
    x : (b, t, in)
    weight : (out, in)
    bias : (out,), optional
    """
    rows: Array = (x.reshape(-1, x.shape[-1]) @ weight.T).astype(x.dtype, copy=False)  # NumPy's is float32 of bfloat16
    out = rows.reshape(*x.shape[:-1], len(weight))
    if bias is not None:
        out += bias
    return out


def linear_backward(d_out: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return d_x, d_weight, and d_bias: d_out W, d_out^T x, and the sum of d_out over the tokens."""
    rows = d_out.reshape(-1, d_out.shape[-1])  # (b t, out)
    d_x = (rows @ weight).astype(x.dtype, copy=False).reshape(x.shape)
    return d_x, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(axis=0, dtype=accumulator(rows.dtype))


def embedding(tokens: Array, table: Array) -> Array:
    """Return the rows of a table, (vocabulary, f), that belong to tokens, (b, t): (b, t, f)."""
    rows: Array = table[tokens]
    return rows


def embedding_backward(d_out: Array, tokens: Array, table: Array) -> Array:
    """Return d_table, float32 or wider: each row the sum over the places where its token stands."""
    wide = accumulator(table.dtype)
    d_table: Array = namespace(table).zeros(table.shape, wide)
    namespace(table).add.at(d_table, tokens.reshape(-1), d_out.reshape(-1, table.shape[1]).astype(wide, copy=False))
    return d_table


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return x / rms(x) * weight, row by row (Zhang and Sennrich 2019, arXiv 1910.07467).

    Parameters
    ----------
    x : (b, t, f)
    weight : (f,)
    eps : float
        Added to the mean square.
    """
    out: Array = (x * _inverse_rms(x, eps)).astype(x.dtype, copy=False)
    out *= weight
    return out


def rms_norm_backward(d_out: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Return d_x = r (g - n mean(g n)) and d_weight = sum(d_out n), where r = 1/rms, n = r x, g = d_out weight."""
    inverse = _inverse_rms(x, eps)
    normed, grown = x * inverse, d_out * weight
    d_x = inverse * (grown - normed * (grown * normed).mean(axis=-1, keepdims=True))
    return d_x.astype(x.dtype, copy=False), _over_tokens(d_out * normed, weight)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Return (x - mean(x)) / std(x) * weight + bias, row by row (Ba et al. 2016, arXiv 1607.06450).

    Parameters
    ----------
    x : (b, t, f)
    weight, bias : (f,)
    eps : float
        Added to the variance.
    """
    centred = _centred(x)
    return (centred * _inverse_rms(centred, eps)).astype(x.dtype, copy=False) * weight + bias


def layer_norm_backward(d_out: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return d_x, that of the RMS norm of the centred row, centred; d_weight; and d_bias."""
    d_centred, d_weight = rms_norm_backward(d_out, _centred(x), weight, eps)
    return _centred(d_centred).astype(x.dtype, copy=False), d_weight, _over_tokens(d_out, weight)


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Return x with the pair of features (i, i + head_dim/2) of each token turned (Su et al. 2021, arXiv 2104.09864).

    Parameters
    ----------
    x : (batch, heads, tokens, head_dim)
    cos, sin : (tokens, 2, head_dim / 2)
        Of its angles, twice; the first sine of each negative.
    """
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    out: Array = pairs * cos
    out += pairs[..., ::-1, :] * sin
    return out.reshape(x.shape)


def rotary_backward(d_out: Array, cos: Array, sin: Array) -> Array:
    """Return d_x: turned back by the same angles."""
    return rotary(d_out, cos, -sin)


def swiglu(gate: Array, up: Array) -> Array:
    """Return gate * sigmoid(gate) * up (Shazeer 2020, arXiv 2002.05202); both are (b, t, f)."""
    out = _one_more(gate)
    namespace(gate).divide(gate, out, out=out)
    out *= up
    return out.astype(gate.dtype, copy=False)


def swiglu_backward(d_out: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Return d_gate and d_up."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu


def gelu(x: Array) -> Array:
    """Return x Phi(x), Phi by tanh as in GPT-2 (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    out: Array = 0.5 * x * (1 + _gelu_tanh(x))
    return out


def gelu_backward(d_out: Array, x: Array) -> Array:
    """Return d_x."""
    tanh, (factor, cubic) = _gelu_tanh(x), GELU
    slope = factor * (1 + 3 * cubic * x * x) * (1 - tanh * tanh)
    d_x: Array = d_out * 0.5 * (1 + tanh + x * slope)
    return d_x


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Return -log softmax(logits)[target] of each token, (b, t), float32 or wider; 0 where the target is negative.

    Parameters
    ----------
    logits : (b, t, vocabulary)
    targets : int64, (b, t)
    """
    xp, wide = namespace(logits), logits.astype(accumulator(logits.dtype)).reshape(-1, logits.shape[-1])
    wide -= wide.max(axis=-1, keepdims=True)
    right = wide[xp.arange(len(wide)), targets.reshape(-1).clip(0)]
    loss: Array = (xp.log(xp.exp(wide).sum(axis=-1)) - right).reshape(targets.shape)
    return loss * (targets >= 0)


def cross_entropy_backward(d_loss: Array | float, logits: Array, targets: Array) -> Array:
    """Return d_logits = d_loss (softmax(logits) - 1 at the target); d_loss is (b, t), or a number for all tokens."""
    xp, d_logits = namespace(logits), logits.astype(accumulator(logits.dtype)).reshape(-1, logits.shape[-1])
    d_logits -= d_logits.max(axis=-1, keepdims=True)
    xp.exp(d_logits, out=d_logits)
    d_logits /= d_logits.sum(axis=-1, keepdims=True)
    d_logits[xp.arange(len(d_logits)), targets.reshape(-1).clip(0)] -= 1
    d_logits *= ((targets >= 0) * d_loss).reshape(-1, 1)
    result: Array = d_logits.reshape(logits.shape).astype(logits.dtype, copy=False)
    return result


def _inverse_rms(x: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean(x^2) + eps) of each row: (b, t, 1), float32 or wider."""
    xp, wide = namespace(x), x.astype(accumulator(x.dtype), copy=False)
    squares = xp.einsum("...f,...f->...", wide, wide)[..., None]
    return 1 / xp.sqrt(squares / x.shape[-1] + eps)  # type: ignore[no-any-return]


def _centred(x: Array) -> Array:
    wide = x.astype(accumulator(x.dtype), copy=False)
    centred: Array = wide - wide.mean(axis=-1, keepdims=True)
    return centred


def _over_tokens(rows: Array, weight: Array) -> Array:
    total = rows.reshape(-1, rows.shape[-1]).sum(axis=0, dtype=accumulator(rows.dtype))
    result: Array = total.astype(weight.dtype, copy=False)
    return result


def _one_more(x: Array) -> Array:
    """Return 1 + exp(-x), float32 or wider; where exp(-x) overflows, infinity is right."""
    xp = namespace(x)
    out: Array = xp.multiply(x, -LOG2E, dtype=accumulator(x.dtype))
    with np.errstate(over="ignore"):
        xp.exp2(out, out=out)  # takes half the time of exp
    out += 1
    return out


def _sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x))."""
    out = _one_more(x)
    return namespace(x).reciprocal(out, out=out).astype(x.dtype, copy=False)  # type: ignore[no-any-return]


def _gelu_tanh(x: Array) -> Array:
    factor, cubic = GELU
    return namespace(x).tanh(factor * (x + cubic * x * x * x))  # type: ignore[no-any-return]
