"""Scores too large for the accumulators: right values, forward and backward, on one rank and on several."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mpiattn import ALGORITHMS, Causal, Documents, Dropout, Full, SlidingWindow
from mpiattn.arrays import accumulator, softmax
from mpiattn.arrays.operations import on_host
from mpiattn.conformance import oracle
from mpiattn.kernels.numpy import scores, slices
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.problems.block import Block

Array = NDArray[Any]
NAMES = "out", "lse", "d_q", "d_k", "d_v"
BOUND = {"float64": 1e-4, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Of errors, relative to what exact arithmetic bounds the numbers by."""


def inputs(tokens: int, dtype: Any = np.float32, dim: int = 64, group: int = 1, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    shapes = (1, 4, tokens, dim), (1, 4 // group, tokens, dim), (1, 4 // group, tokens, dim), (1, 4, tokens, dim)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def reference(arrays: list[Array], scale: float, causal: bool) -> list[Array]:
    """Textbook attention and its gradients in float64, as many heads of K and V as of Q."""
    q, k, v, d_out = (array.astype(np.float64) for array in arrays)
    score = scale * (q @ k.swapaxes(2, 3))
    if causal:
        score[:, :, ~np.tri(*score.shape[2:]).astype(bool)] = -np.inf
    top = score.max(axis=3, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(axis=3, keepdims=True)
    weight /= total
    d_weight = d_out @ v.swapaxes(2, 3)
    d_score = weight * (d_weight - (weight * d_weight).sum(axis=3, keepdims=True))
    lse = (top + np.log(total))[..., 0]
    gradients = scale * d_score @ k, scale * d_score.swapaxes(2, 3) @ q, weight.swapaxes(2, 3) @ d_out
    return [weight @ v, lse, *gradients]


def bounds(arrays: list[Array], scale: float) -> list[float]:
    """Return what a number of out, lse, dQ, dK and dV can be, roughly, in exact arithmetic."""
    q, k, v, d_out = (float(np.linalg.norm(a.astype(np.float64), axis=3).max(initial=0)) for a in arrays)
    slope = abs(scale) * d_out * v
    return [max(v, 1.0), max(1.0, 1e-6 * abs(scale) * q * k), slope * k, slope * q, max(d_out, 1.0)]


def check(results: list[Array], right: list[Array], limits: list[float], relative: float = 1e-3) -> None:
    for name, result, expected, limit in zip(NAMES, results, right, limits, strict=True):
        np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected), err_msg=name)
        some = np.isfinite(expected)
        error = np.abs(result[some] - expected[some]).max(initial=0)
        assert error <= relative * limit, f"{name}: error {error:.2e}, {relative * limit:.2e} is allowed"


def block(
    arrays: list[Array], mask: Any, scale: float | None, softcap: float | None = None, dropout: Dropout | None = None,
    sinks: Array | None = None,
) -> list[Array]:  # fmt: skip
    """Return what the kernel makes of one block."""
    q, k, v, d_out = arrays
    kernel, positions, wide = NumpyKernel(scale, softcap), np.arange(q.shape[2]), accumulator(q.dtype)
    whole = Block(mask, positions, positions)
    kernel.drop(dropout)
    out, lse = np.zeros(d_out.shape, wide), np.full(q.shape[:3], -np.inf)
    kernel.forward(q, k, v, block=whole, out=out, lse=lse)
    if sinks is not None:
        out, lse = softmax.with_sinks(out, lse, sinks)
    d_q, d_k, d_v = (np.zeros(array.shape, wide) for array in (q, k, v))
    delta = softmax.delta(d_out, out.astype(q.dtype))
    kernel.backward(q, k, v, block=whole, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v)
    return [out, lse, d_q, d_k, d_v]


def attend(
    comm: Any, name: str, arrays: list[Array], xp: Any = np, **options: Any
) -> tuple[list[Array], list[tuple[Any, ...]]]:
    """Return this rank's results of an algorithm, and which part of the whole each of them is; xp: numpy or cupy."""
    with ALGORITHMS[name](comm, **options) as attention:
        shapes = dict(zip(("q", "k", "v", "out"), (array.shape for array in arrays), strict=True))
        parts = [attention.owned(part, shapes)(shape, comm.Get_rank()) for part, shape in shapes.items()]
        mine = (np.ascontiguousarray(array[part]) for array, part in zip(arrays, parts, strict=True))
        q, k, v, d_out = map(xp.asarray, mine)
        out, saved = attention.forward(q, k, v)
        results = map(on_host, (out, saved.lse, *attention.backward(d_out, saved)))
        return list(results), [parts[3], parts[3], *parts[:3]]


def check_algorithm(comm: Any, name: str, arrays: list[Array], scale: float | None, causal: bool, xp: Any = np) -> None:
    results, parts = attend(comm, name, arrays, xp, scale=scale, mask=Causal() if causal else Full())
    factor = arrays[0].shape[3] ** -0.5 if scale is None else scale
    right = [a[part] for a, part in zip(reference(arrays, factor, causal), parts, strict=True)]
    check(results, right, [1.0, *bounds(arrays, factor)[1:4], 1.0])


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scales(comm: Any, name: str, causal: bool) -> None:
    """At 10**7 and more, gradients were up to 10**14, or not a number."""
    for scale in (1e4, 1e7, 1e8) if causal else (1e6, -1e7, 1e13):
        check_algorithm(comm, name, inputs(16), scale, causal)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_token_and_several(comm: Any, name: str) -> None:
    """Tokens of one large number: all scores of a row are the same."""
    for dim in (1, 64):
        token = np.full((1, 4, 1, dim), 133120, np.float32)
        results, _ = attend(comm, name, [token, token, token, np.ones_like(token)])
        out, _, d_q, d_k, d_v = results
        for result, right in ((out, 133120), (d_q, 0), (d_k, 0), (d_v, 1)):
            np.testing.assert_array_equal(result, np.broadcast_to(right, result.shape))
        tokens = np.repeat(token, 9, axis=2)
        check_algorithm(comm, name, [tokens, tokens, inputs(9, dim=dim)[2], inputs(9, dim=dim)[3]], None, False)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("offset", [-2e4, 2e4])
def test_scores_around_a_large_one(comm: Any, name: str, offset: float) -> None:
    """Scores that differ by a few, far from zero: probabilities of all sizes."""
    q, k, v, d_out = inputs(9)
    q[..., 0], k[..., 0] = 400, offset / 50
    check_algorithm(comm, name, [q, k, v, d_out], None, False)
    check_algorithm(comm, name, [q, k, v, d_out], None, True)


MASKS = [Full(), Causal(), SlidingWindow(20, 3), Documents([0, 40, 90]) & Causal()]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("seed", range(12))
def test_rows_of_all_sizes(dtype: str, seed: int) -> None:
    """Queries and keys from tiny to huge in one block; masks, grouped heads, softcap, dropout, sinks."""
    random = np.random.default_rng(seed)
    q, k, v, d_out = inputs(130, np.float64, dim=int(random.choice([1, 8, 64])), group=[1, 2, 4][seed % 3], seed=seed)
    most = 2 if dtype == "float16" else 4
    q *= 10.0 ** random.uniform(-most, most, (*q.shape[:3], 1))
    k *= 10.0 ** random.uniform(-most, most, (*k.shape[:3], 1))
    arrays = [array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for array in (q, k, v, d_out)]
    scale = float(random.choice([1e-3, 1, -1, 30, 1e5]))
    features: dict[str, Any] = {
        "softcap": [None, None, 30.0, 1e5][seed % 4],
        "dropout": Dropout(0.3, seed) if seed % 5 == 1 else None,
        "sinks": random.choice([-1e6, 0.0, 1e3, 1e8], 4) if seed % 5 == 2 else None,
    }
    with np.errstate(all="raise", under="ignore"):
        results = block(arrays, MASKS[seed % 4], scale, **features)
    q, k, v, d_out = arrays
    right = [
        *oracle.attention(q, k, v, MASKS[seed % 4], scale, **features),
        *oracle.gradients(q, k, v, d_out, MASKS[seed % 4], scale, **features),
    ]
    limits = bounds(arrays, scale)
    limits[1] = max(limits[1], np.abs(right[1][np.isfinite(right[1])]).max())
    check(results, right, limits, BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [0.0, 1e-310, 1e-42, -1e-42, 1e-30, 1e30, 1e42])
def test_scales_that_the_dtype_does_not_hold(scale: float, dtype: str) -> None:
    """Where float32 can't hold the scale, it may well hold the queries, the keys and the results."""
    q, k, v, d_out = inputs(20, dtype)
    size = q.dtype.type(min(abs(scale) ** -0.5, 1e18) if scale else 1)
    for factor in (size, size / 100):
        given = [q * factor, k * factor, v, d_out]
        limits = [max(limit, float(np.finfo(dtype).tiny)) for limit in bounds(given, scale)]
        check(block(given, Causal(), scale), reference(given, scale, True), limits)


def test_far_beyond_what_float64_can_add_up() -> None:
    """Scores of 10**20 and more, whose sums of products differ by thousands in another order."""
    q, k, v, d_out = inputs(700, np.float64)
    positions = np.arange(700)
    for scale in (1e16, 1e20, -1e25, 1e120):
        out, lse, *_ = block([q, k, v, d_out], Full(), scale)
        rows = np.abs(out - reference([q, k, v, d_out], scale, False)[0]).max(axis=3) < 1e-9
        assert rows.mean() > 0.99  # elsewhere two scores are the same but for their last bits
        d_q, d_k, d_v = (np.zeros_like(array) for array in (q, k, v))
        delta = softmax.delta(d_out, out)
        for rows in (slice(331), slice(331, 332), slice(332, 700)):  # other shapes than forward
            part = Block(Full(), positions[rows], positions, rows)
            NumpyKernel(scale).backward(
                q, k, v, block=part, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )
        # The probabilities of each query sum up to 1.
        np.testing.assert_allclose(d_v.sum(axis=2), d_out.sum(axis=2), atol=1e-9)


def test_a_probability_never_exceeds_1() -> None:
    """Scores that are more than their lse, by rounding or by an lse of something else."""
    for dtype in (np.float32, np.float64):
        for form in (scores.Form(np.dtype(dtype)), scores.Form(np.dtype(np.float64), raw=True)):
            score = np.linspace(-1e-3, 100, 50, dtype=form.dtype).reshape(5, 10)
            scores.weigh(score, form, None, top=0)
            assert score.max() == 1


@pytest.mark.parametrize("dim", [1, 5, 64, 200])
def test_products_of_slices(dim: int) -> None:
    """They are as exact as a sum in longer numbers, and have the same bits whatever part is computed."""
    random = np.random.default_rng(dim)
    a, b = (random.standard_normal((90, dim)) * 10.0 ** random.uniform(-9, 9, (90, 1)) for _ in "ab")
    left, right = slices.cut(a), slices.reversed_columns(b)
    whole = slices.product(left, right)
    sizes = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble).T
    assert (np.abs(whole - exact) <= 2.0**-52 * sizes).all()
    for rows, columns in ((slice(1), slice(90)), (slice(3, 50), slice(7, 9)), (slice(17, 90), slice(64, 71))):
        part = slices.product(slices.cut(a[rows]), slices.reversed_columns(b[columns]))
        np.testing.assert_array_equal(part, whole[rows, columns])


def test_ordinary_scores_stay_narrow() -> None:
    """Float64 takes twice as long, and slices six times: neither is for what models compute."""
    q, k, _, _ = inputs(500)
    form = scores.form_of(q, k, 0.125, None, q.dtype)
    assert form.dtype == np.float32 and not form.raw
    form = scores.form_of(q, k, 100.0, None, q.dtype)
    assert form.raw and not form.sliced
    assert scores.form_of(q, k, 1e9, None, q.dtype).sliced
