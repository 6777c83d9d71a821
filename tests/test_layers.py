"""The layers of models: each gradient against finite differences, each formula against another way to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiattn.arrays import Array
from mpiattn.models import layers

B, T, F = 2, 3, 8
STEP = 1e-6


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def check(
    forward: Callable[..., Array], backward: Callable[..., Any], *given: Array, constant: tuple[Any, ...] = ()
) -> None:
    """Compare the gradients with central differences, in a random direction of each array that is given."""
    d_out = normal(*forward(*given, *constant).shape, seed=1)
    gradients = backward(d_out, *given, *constant)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) >= len(given)
    for index, (array, gradient) in enumerate(zip(given, gradients, strict=False)):
        assert gradient.shape == array.shape and gradient.dtype == array.dtype
        way = normal(*array.shape, seed=2)
        ends = []
        for step in (STEP, -STEP):
            moved = [*given]
            moved[index] = array + step * way
            ends.append(float((forward(*moved, *constant) * d_out).sum()))
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(float((gradient * way).sum()), rel=1e-7, abs=1e-8)


def test_linear() -> None:
    x, weight, bias = normal(B, T, F), normal(5, F), normal(5)

    def backward(d_out: Array, x: Array, weight: Array, bias: Array) -> Any:
        return layers.linear_backward(d_out, x, weight)

    check(layers.linear, backward, x, weight, bias)
    assert np.allclose(layers.linear(x, weight), np.einsum("btf,of->bto", x, weight))


def test_embedding() -> None:
    tokens, table = np.array([[1, 4, 1], [0, 1, 4]]), normal(6, F)

    def backward(d_out: Array, table: Array) -> Array:
        return layers.embedding_backward(d_out, tokens, table)

    check(lambda table: layers.embedding(tokens, table), backward, table)


def test_norms() -> None:
    x, weight, bias = normal(B, T, F), normal(F), normal(F, seed=3)
    check(layers.rms_norm, layers.rms_norm_backward, x, weight, constant=(1e-5,))

    def backward(d_out: Array, x: Array, weight: Array, bias: Array, eps: float) -> Any:
        return layers.layer_norm_backward(d_out, x, weight, eps)

    check(layers.layer_norm, backward, x, weight, bias, constant=(1e-5,))
    assert np.allclose(layers.rms_norm(x, weight, 0), weight * x / np.sqrt((x**2).mean(-1, keepdims=True)))
    normed = layers.layer_norm(x, np.ones(F), np.zeros(F), 0)
    assert np.allclose(normed.mean(-1), 0) and np.allclose(normed.std(-1), 1)


def test_rotary() -> None:
    """A pair of features is one complex number, turned; the scores of turned vectors go by distance."""
    x, angles = normal(B, 2, T, F), np.arange(T)[:, None] * np.array([1.0, 0.3, 0.1, 0.01])
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    cos, sin = np.stack([np.cos(angles)] * 2, axis=1), np.stack([-np.sin(angles), np.sin(angles)], axis=1)
    assert np.allclose(layers.rotary(x, cos, sin), np.concatenate([turned.real, turned.imag], axis=-1))

    def backward(d_out: Array, x: Array) -> Array:
        return layers.rotary_backward(d_out, cos, sin)

    check(lambda x: layers.rotary(x, cos, sin), backward, x)


def test_activations() -> None:
    gate, up = 3 * normal(B, T, F), normal(B, T, F, seed=4)
    check(layers.swiglu, layers.swiglu_backward, gate, up)
    check(layers.gelu, layers.gelu_backward, gate)
    phi = np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(gate)
    assert np.allclose(layers.gelu(gate), gate * phi, atol=1e-3)
    far = np.array([[[-1000.0, 1000.0]]], np.float32)
    assert np.array_equal(layers.swiglu(far, np.ones_like(far)), [[[0, 1000]]])


def test_cross_entropy() -> None:
    logits, targets = 5 * normal(B, T, F), np.array([[0, 7, -1], [3, 3, -100]])
    loss = layers.cross_entropy(logits, targets)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.allclose(loss[0, :2], -np.log([probabilities[0, 0, 0], probabilities[0, 1, 7]]))
    assert loss[0, 2] == loss[1, 2] == 0

    def backward(d_out: Array, logits: Array) -> Array:
        return layers.cross_entropy_backward(d_out, logits, targets)

    check(lambda logits: layers.cross_entropy(logits, targets), backward, logits)
    assert not layers.cross_entropy_backward(1.0, logits, targets)[0, 2].any()
    assert np.isfinite(layers.cross_entropy(np.array([[[1e4, -1e4]]], np.float32), np.array([[1]]))).all()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_rows_are_summed_in_float32(narrow: str) -> None:
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, narrow, narrow))
    x = np.full((1, 1, 4096), 30, dtype)  # its squares add up to more than float16 holds
    out = layers.rms_norm(x, np.ones(4096, dtype), 1e-6)
    assert out.dtype == dtype and (out == 1).all()
    assert layers.cross_entropy(x, np.array([[0]])) == pytest.approx(math.log(4096))


def test_sums_over_tokens_are_wider_than_bfloat16() -> None:
    """4,096 ones add up to 4,096; in bfloat16 they would end at 256, where one more is rounded away."""
    import ml_dtypes

    ones = np.ones((1, 4096, 2), ml_dtypes.bfloat16)
    out = layers.linear(ones, ones[0, :2])
    d_x, *sums = layers.linear_backward(ones, ones, ones[0, :2])
    assert out.dtype == d_x.dtype == ones.dtype and (out == 2).all() and (d_x == 2).all()
    sums.append(layers.embedding_backward(ones, np.zeros((1, 4096), int), ones[0, :3])[0])
    sums.append(layers.layer_norm_backward(ones, ones, ones[0, 0], 1e-6)[2])
    assert all((total == 4096).all() for total in sums)
