"""The NumPy kernel against a dense float64 reference, block by block; no MPI."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpiattn.arrays import accumulator, softmax
from mpiattn.kernels.numpy.kernel import KEPT, NumpyKernel
from mpiattn.kernels.numpy.scores import Form, weigh
from mpiattn.kernels.numpy.tiles import KEYS, QUERIES, SIDE, Plan, plan
from mpiattn.problems import layout as layouts
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Causal, Documents, Full, Mask, SlidingWindow, allowed
from mpiattn.problems.pairs import pairs

Array = NDArray[Any]
TOLERANCE = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 2e-5}  # relative to max|reference|
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
NAMES = ("out", "lse", "d_q", "d_k", "d_v")


def reference(q: Array, k: Array, v: Array, d_out: Array, visible: Array, scale: float | None = None) -> list[Array]:
    """Textbook attention and its gradients in float64, with the whole matrix of scores."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = np.where(visible, scale * (q @ k.swapaxes(-1, -2)), -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    weights /= np.where(total == 0, 1, total)
    out = weights @ v
    d_v = weights.swapaxes(-1, -2) @ d_out
    d_weights = d_out @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    d_q = scale * d_scores @ k
    d_k = scale * d_scores.swapaxes(-1, -2) @ q

    def per_kv_head(x: Array) -> Array:
        return np.asarray(x.reshape(batch, kv_heads, group, *x.shape[2:]).sum(axis=2))

    return [out, lse, d_q, per_kv_head(d_k), per_kv_head(d_v)]


def chunked(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    mask: Mask,
    chunks: tuple[list[Array], list[Array]],
    scale: float | None = None,
) -> list[Array]:
    """Run the kernel on every pair of a query chunk and a key chunk, merged together."""
    kernel, wide = NumpyKernel(scale), accumulator(q.dtype)
    out, lse = np.zeros((*q.shape[:3], v.shape[3]), wide), np.full(q.shape[:3], -np.inf)
    d_q, d_k, d_v = (np.zeros(x.shape, wide) for x in (q, k, v))
    for i in chunks[0]:
        part, part_lse = out[:, :, i], lse[:, :, i]
        for j in chunks[1]:
            kernel.forward(q[:, :, i], k[:, :, j], v[:, :, j], block=Block(mask, i, j), out=part, lse=part_lse)
        out[:, :, i], lse[:, :, i] = part, part_lse
        delta = softmax.delta(d_out[:, :, i], part)
        for j in chunks[1]:
            parts = d_q[:, :, i], d_k[:, :, j], d_v[:, :, j]
            inputs = q[:, :, i], k[:, :, j], v[:, :, j], d_out[:, :, i]
            backward(kernel, *inputs, part_lse, delta, Block(mask, i, j), *parts)
            d_q[:, :, i], d_k[:, :, j], d_v[:, :, j] = parts
    return [out, lse, d_q, d_k, d_v]


def backward(
    kernel: NumpyKernel, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array, block: Block,
    d_q: Array, d_k: Array, d_v: Array, progress: Any = None,
) -> None:  # fmt: skip
    rows, sums = {"d_out": d_out, "lse": lse, "delta": delta}, {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    kernel.backward(q, k, v, block=block, progress=progress, **rows, **sums)


def whole(tokens: int) -> list[Array]:
    return [np.arange(tokens)]


def split(layout: str, tokens: int, ranks: int) -> list[Array]:
    return [layouts.positions(layout, tokens, ranks, rank) for rank in range(ranks)]


def inputs(
    q_tokens: int,
    k_tokens: int | None = None,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: Any = np.float64,
    seed: int = 0,
) -> tuple[Array, Array, Array, Array]:
    random = np.random.default_rng(seed)
    k_tokens = q_tokens if k_tokens is None else k_tokens
    shapes = [
        (batch, heads[0], q_tokens, dims[0]),
        (batch, heads[1], k_tokens, dims[0]),
        (batch, heads[1], k_tokens, dims[1]),
        (batch, heads[0], q_tokens, dims[1]),
    ]
    q, k, v, d_out = (random.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v, d_out


def compare(results: list[Array], expected: list[Array], tolerance: float | None = None) -> None:
    for name, result, right in zip(NAMES, results, expected, strict=False):
        limit = TOLERANCE[results[0].dtype] if tolerance is None else tolerance
        finite = np.isfinite(right)
        np.testing.assert_array_equal(result[~finite], right[~finite], err_msg=name)
        scale = np.abs(right[finite]).max(initial=0.1)  # a gradient may be zero, of inputs of size 1
        error = np.abs(result[finite] - right[finite]).max(initial=0)
        assert error <= limit * scale, f"{name}: error {error:.2e} where the largest is {scale:.2e}"


def check(
    mask: Mask,
    chunks: tuple[list[Array], list[Array]] | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    q, k, v, d_out = inputs(**options)
    chunks = chunks or (whole(q.shape[2]), whole(k.shape[2]))
    visible = allowed(mask, np.arange(q.shape[2]), np.arange(k.shape[2]))
    expected = reference(q, k, v, d_out, visible, scale)
    compare(chunked(q, k, v, d_out, mask, chunks, scale), expected, tolerance)


MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": SlidingWindow(70),
    "window both ways": SlidingWindow(30, 200),
    "documents": Documents([300, 0, 1, 45, 354]),
    "causal documents": Documents([300, 0, 1, 45, 354]) & Causal(),
    "documents of a window": SlidingWindow(40, 3) & Documents([350, 350]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_dtypes_and_masks(dtype: Any, mask: Mask) -> None:
    check(mask, q_tokens=700, dtype=dtype)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_blocks_of_ranks_merge(layout: str, mask: Mask, dtype: Any) -> None:
    chunks = split(layout, 700, 3)
    check(mask, (chunks, chunks), q_tokens=700, dtype=dtype)


def test_error_does_not_grow_with_ranks() -> None:
    for ranks in (1, 16, 64):
        chunks = split("striped", 640, ranks)
        check(Causal(), (whole(640), chunks), q_tokens=640, dtype=np.float32, tolerance=2e-6)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dims", [(16, 16), (8, 24), (24, 1)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_heads_batches_and_dims(heads: tuple[int, int], dims: tuple[int, int], dtype: Any) -> None:
    check(Causal(), q_tokens=90, batch=3, heads=heads, dims=dims, dtype=dtype)


def test_scale() -> None:
    check(Causal(), scale=0.6, q_tokens=90)


EDGES = [1, 2, 15, 16, 17, SIDE - 1, SIDE, SIDE + 1, QUERIES - 1, QUERIES, QUERIES + 1, KEYS - 1, KEYS, KEYS + 1]


@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_tile_boundaries(mask: Mask) -> None:
    for q_tokens in EDGES:
        for k_tokens in EDGES:
            check(mask, q_tokens=q_tokens, k_tokens=k_tokens, heads=(1, 1), dims=(3, 2))


@pytest.mark.parametrize("q_tokens, k_tokens", [(0, 0), (0, 5), (5, 0)])
def test_zero_lengths(q_tokens: int, k_tokens: int) -> None:
    check(Full(), q_tokens=q_tokens, k_tokens=k_tokens)
    check(Causal(), q_tokens=q_tokens, k_tokens=k_tokens)


def test_more_ranks_than_tokens() -> None:
    for layout in layouts.LAYOUTS:
        chunks = split(layout, 5, 8)
        check(Causal(), (chunks, chunks), q_tokens=5)


class Sparse(Mask):
    """Even queries see nothing, odd ones three keys."""

    def bounds(self, queries: Array) -> tuple[Array, Array]:
        return queries - 1, np.where(queries % 2 == 0, 0, queries + 2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_fully_masked_rows(dtype: Any, factor: float) -> None:
    q, k, v, d_out = inputs(500, dtype=dtype)
    q *= factor
    with np.errstate(all="raise", under="ignore", divide="ignore"):
        results = chunked(q, k, v, d_out, Sparse(), (whole(500), split("contiguous", 500, 2)))
    out, lse, d_q = results[:3]
    assert all(np.isfinite(x).all() for x in (out, *results[2:]))
    assert np.isneginf(lse[:, :, ::2]).all() and np.isfinite(lse[:, :, 1::2]).all()
    assert not out[:, :, ::2].any() and not d_q[:, :, ::2].any()
    tolerance = None if factor == 1 else 100 * TOLERANCE[np.dtype(dtype)]
    expected = reference(q, k, v, d_out, allowed(Sparse(), np.arange(500), np.arange(500)))
    compare(results, expected, tolerance)


def test_row_without_keys_has_no_gradient() -> None:
    """lse = -inf gives zero gradients, whatever the mask says of this block."""
    q, k, v, d_out = inputs(40)
    q *= 1e3  # exp2 of its scores would overflow
    block = Block(Full(), np.arange(40), np.arange(40))
    d_q, d_k, d_v = (np.zeros_like(x) for x in (q, k, v))
    lse, delta = np.full(q.shape[:3], -np.inf), np.ones(q.shape[:3])
    backward(NumpyKernel(), q, k, v, d_out, lse, delta, block, d_q, d_k, d_v)
    assert not d_q.any() and not d_k.any() and not d_v.any()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nan_in_nan_out(which: str, dtype: Any) -> None:
    """A NaN reaches the rows that see it, and no row of another document."""
    mask = Documents([600, 200])
    q, k, v, d_out = inputs(800, dtype=dtype)
    {"q": q, "k": k, "v": v}[which][0, 1, 20] = np.nan
    out, lse, *_ = chunked(q, k, v, d_out, mask, (whole(800), split("contiguous", 800, 2)))
    rows = np.zeros(out.shape[:3], bool)
    rows[0, 1, slice(20, 21) if which == "q" else slice(0, 600)] = True
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(rows[..., None], out.shape))
    np.testing.assert_array_equal(np.isnan(lse), rows if which != "v" else np.zeros_like(rows))


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(100)])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_logits_of_1e4(mask: Mask, layout: str) -> None:
    """Scores of +-1e4, both signs in a row, and rows far below or above all others; see test_large_scores.py, too."""
    q, k, v, d_out = inputs(600, dims=(4, 8), seed=3)
    chunks = split(layout, 600, 2)
    visible = allowed(mask, np.arange(600), np.arange(600))
    q *= 1e4 / np.abs(q @ k.swapaxes(-1, -2)).max()
    expected = reference(q, k, v, d_out, visible, 1.0)
    assert np.abs(expected[1]).max() > 3e3
    compare(chunked(q, k, v, d_out, mask, (chunks, chunks), 1.0), expected)
    q, k, v, d_out = (x.astype(np.float32) for x in (q, k, v, d_out))
    expected = reference(q, k, v, d_out, visible, 1.0)
    compare(chunked(q, k, v, d_out, mask, (chunks, chunks), 1.0), expected)
    # Scores from -1e4 to 1e4 in steps of 2000.
    q, k = np.zeros_like(q), np.zeros_like(k)
    q[..., 0] = 2000
    k[..., 0] = np.random.default_rng(4).integers(-5, 6, k.shape[:-1])
    expected = reference(q, k, v, d_out, visible, 1.0)
    compare(chunked(q, k, v, d_out, mask, (whole(600), whole(600)), 1.0)[:2], expected[:2])


def compare_rows(result: Array, right: Array) -> None:
    assert np.abs(result - right).max() <= 1e-10 * np.abs(right).max()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_shift_follows_the_row(offset: float) -> None:
    """Later tiles raise, or lie far below, the shift that the first tile set."""
    tokens = 4 * KEYS
    q, k, v, d_out = inputs(20, tokens, heads=(1, 1), dims=(2, 4))
    k[0, 0, :, 1] = np.linspace(0, offset, tokens)
    q[0, 0, :, 1] = np.linspace(-1, 1, 20)
    expected = reference(q, k, v, d_out, np.ones((20, tokens), bool), 1.0)
    compare(chunked(q, k, v, d_out, Full(), (whole(20), whole(tokens)), 1.0), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_weights_are_never_denormal(dtype: Any) -> None:
    """They would cost a matrix product 100 times its time."""
    score = np.linspace(-2e4, 0, 100, dtype=dtype)[None]
    weigh(score, Form(score.dtype), None)
    assert score.min() > 1e5 * np.finfo(dtype).tiny


def test_merges_into_what_is_there() -> None:
    """Forward merges and backward adds: results of other blocks are kept."""
    q, k, v, d_out = inputs(50)
    block = Block(Full(), np.arange(50), np.arange(50))
    out, lse = np.ones_like(q), np.zeros(q.shape[:3])
    NumpyKernel().forward(q, k, v, block=block, out=out, lse=lse)
    own_out, own_lse, *own = reference(q, k, v, d_out, np.ones((50, 50), bool))
    weight = (1 / (1 + np.exp(own_lse)))[..., None]
    compare_rows(out, weight + (1 - weight) * own_out)
    compare_rows(lse, np.log1p(np.exp(own_lse)))
    delta = (d_out * own_out).sum(axis=-1)
    gradients = np.full_like(q, 7), np.full_like(k, 7), np.full_like(v, 7)
    backward(NumpyKernel(), q, k, v, d_out, own_lse, delta, block, *gradients)
    for result, right in zip(gradients, own, strict=True):
        compare_rows(result, right + 7)


def test_gradients_by_finite_differences() -> None:
    mask = Causal() & SlidingWindow(9)
    arrays = inputs(30, heads=(2, 1), dims=(4, 3))
    d_out = arrays[3]
    everything = whole(30), whole(30)
    gradients = chunked(*arrays, mask, everything)[2:]
    random = np.random.default_rng(1)
    for number, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        loss = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[number] = moved[number] + step * direction
            loss.append((chunked(moved[0], moved[1], moved[2], d_out, mask, everything)[0] * d_out).sum())
        assert (loss[0] - loss[1]) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-6)


def test_views_and_buffers() -> None:
    """Non-contiguous inputs and accumulators; one object for blocks of many shapes and dtypes."""
    kernel = NumpyKernel()
    for tokens, dtype in ((300, np.float32), (40, np.float64), (500, np.float32), (7, np.float32)):
        q, k, v, d_out = inputs(tokens, heads=(4, 2), dtype=dtype)
        expected = reference(q, k, v, d_out, np.tri(tokens, dtype=bool))
        # Stored as (batch, tokens, heads, head_dim), every other number of a wider array.
        q, k, v, d_out = (np.repeat(x.swapaxes(1, 2), 2, axis=-1)[..., ::2].swapaxes(1, 2) for x in (q, k, v, d_out))
        out, d_q, d_k, d_v = (np.zeros_like(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, q, k, v))
        lse = np.full((1, tokens, 4), -np.inf).swapaxes(1, 2)
        positions = np.arange(2 * tokens)[::2]
        block = Block(Causal(), positions, positions)
        kernel.forward(q, k, v, block=block, out=out, lse=lse)
        delta = softmax.delta(d_out, out)
        backward(kernel, q, k, v, d_out, lse, delta, block, d_q, d_k, d_v)
        compare([out, lse, d_q, d_k, d_v], expected)


def test_progress_is_called_between_tiles() -> None:
    q, k, v, d_out = inputs(2 * QUERIES, 2 * KEYS, dims=(4, 4))
    block = Block(Full(), np.arange(2 * QUERIES), np.arange(2 * KEYS))
    calls: list[int] = []
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    kernel = NumpyKernel()
    kernel.forward(q, k, v, block=block, out=out, lse=lse, progress=lambda: calls.append(1))
    assert len(calls) == 2 * 4
    gradients = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    delta = softmax.delta(d_out, out)
    backward(kernel, q, k, v, d_out, lse, delta, block, *gradients, progress=lambda: calls.append(1))
    assert len(calls) == 2 * 2 * 4


def test_same_inputs_give_the_same_bits() -> None:
    arrays = inputs(300, dtype=np.float32)
    chunks = split("zigzag", 300, 2)
    first, second = (chunked(*arrays, Causal(), (chunks, chunks)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_does_not_grow_with_the_square() -> None:
    peaks = {}
    for tokens in (4096, 8192):
        q, k, v, d_out = inputs(tokens, heads=(8, 8), dims=(64, 64), dtype=np.float32)
        block = Block(Causal(), np.arange(tokens), np.arange(tokens))
        delta = np.zeros(q.shape[:3], np.float32)
        kernel = NumpyKernel()
        tracemalloc.start()
        out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
        kernel.forward(q, k, v, block=block, out=out, lse=lse)
        forward = tracemalloc.get_traced_memory()[1]
        del out, kernel
        tracemalloc.reset_peak()
        kernel = NumpyKernel()
        gradients = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        backward(kernel, q, k, v, d_out, lse, delta, block, *gradients)
        peaks[tokens] = forward, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[4096][0] < 16e6 and peaks[4096][1] < 40e6
    assert all(large < 2.1 * small for small, large in zip(peaks[4096], peaks[8192], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    q_runs=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 500)), max_size=3),
    k_runs=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 500)), max_size=3),
    stride=st.sampled_from([1, 2, 5]),
    mask=st.sampled_from([Full(), Causal(), SlidingWindow(100), SlidingWindow(3, 300), Documents([9, 700, 9000])]),
    group=st.integers(1, 9),
)
def test_plan_covers_every_pair_once(
    q_runs: list[tuple[int, int]], k_runs: list[tuple[int, int]], stride: int, mask: Mask, group: int
) -> None:
    def ascending(runs: list[tuple[int, int]]) -> Array:
        parts, at = [np.zeros(0, np.int64)], 0
        for gap, length in runs:
            parts.append(at + gap + stride * np.arange(length))
            at = int(parts[-1][-1]) + 1
        return np.concatenate(parts)

    queries, keys = ascending(q_runs), ascending(k_runs)
    together, rows_of_tiles = plan(Block(mask, queries, keys), group)
    assert group % together == 0
    seen = np.zeros((len(keys), len(queries) * together), np.int64)  # columns: by query, the heads of each side by side
    computed = 0
    for rows, tiles in rows_of_tiles:
        columns = slice(rows.start * together, rows.stop * together)
        for tile in tiles:
            part = seen[tile.keys, columns][:, tile.queries]
            part += 1 if tile.visible is None else tile.visible
            computed += part.size // together
    np.testing.assert_array_equal(seen.T, allowed(mask, queries, keys).repeat(together, axis=0))
    # Little is computed in vain: a margin along the two edges of what each row sees.
    assert computed <= pairs(mask, queries, keys) + 2 * SIDE * (len(queries) + len(keys)) + SIDE * SIDE


@pytest.mark.parametrize(("tokens", "plans"), [(64, 1), (300, 2)])
def test_plans_of_small_blocks_are_kept(monkeypatch: pytest.MonkeyPatch, tokens: int, plans: int) -> None:
    made: list[Block] = []

    def counted(block: Block, group: int) -> Plan:
        made.append(block)
        return plan(block, group)

    monkeypatch.setattr(f"{NumpyKernel.__module__}.plan", counted)
    q, k, v, _ = inputs(tokens, dtype=np.float32)
    kernel, positions = NumpyKernel(), np.arange(tokens)
    for _ in range(2 * KEPT):
        made.clear()
        block, results = Block(Causal(), positions, positions), []
        for _ in range(2):
            out, lse = np.zeros(q.shape[:3] + v.shape[3:], np.float32), np.full(q.shape[:3], -np.inf)
            kernel.forward(q, k, v, block=block, out=out, lse=lse)
            results.append(out)
        assert made == [block] * plans and np.array_equal(results[0], results[1])
    assert len(kernel.plans) <= KEPT


def test_no_queries_before_many_keys() -> None:
    q, k, v, d_out = (np.zeros((1, 2, tokens, 3), np.float32) for tokens in (0, 64, 64, 0))
    block, kernel = Block(Full(), np.arange(0), np.arange(64)), NumpyKernel()
    out, lse = np.zeros_like(q), np.zeros(q.shape[:3])
    kernel.forward(q, k, v, block=block, out=out, lse=lse)
    backward(kernel, q, k, v, d_out, lse, np.zeros(q.shape[:3], np.float32), block, out, k.copy(), v.copy())
    assert out.shape == q.shape
