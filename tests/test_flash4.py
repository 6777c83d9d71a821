"""FlashAttention-4's kernel around the library: what it is told, and what comes back. Neither GPU nor CuPy nor library.

The library's two functions are doubles in NumPy, which queue what they compute as the library does: by compiled kernels
that it keeps, of which some leave parts to the next one in scratch memory. That holds NaN before each call.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpiattn import kernels
from mpiattn.arrays import Array
from mpiattn.arrays.cupy.place import Place
from mpiattn.arrays.softmax import merge
from mpiattn.errors import InputError
from mpiattn.kernels.cudnn import library as cudnn
from mpiattn.kernels.flash4 import launches, library, memory, plans
from mpiattn.kernels.flash4.memory import Layout
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.kernels.pieces.cut import pieces
from mpiattn.problems import layout
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Mask, parse
from mpiattn.problems.problem import Problem

BATCH, HEADS, KV_HEADS, DIM, V_DIM = 2, 4, 2, 16, 8
SCALE = 0.3
TILE = 48  # rows to which scratch is rounded up


def visible(queries: int, keys: int, causal: bool, left: int | None, right: int | None) -> Array:
    """Return the library's mask, of which the diagonal ends at the last key: (queries, keys)."""
    ahead: Array = np.arange(keys) - np.arange(queries)[:, None] - (keys - queries)
    seen: Array = ahead >= (-queries - keys if left is None else -left)
    seen &= ahead <= ((right or 0) if causal or right is not None else queries)
    return seen


def spread(kv: Array, heads: int) -> Array:
    """Return K or V in float32 with a copy for each query head: (batch, heads, tokens, head_dim)."""
    result: Array = kv.astype(np.float32).transpose(0, 2, 1, 3).repeat(heads // kv.shape[2], axis=1)
    return result


def scores(q: Array, k: Array, scale: float, seen: Array) -> Array:
    product: Array = scale * q.astype(np.float32).transpose(0, 2, 1, 3) @ spread(k, q.shape[2]).swapaxes(2, 3)
    return np.where(seen, product, -np.inf)


def forward(q: Array, k: Array, v: Array, out: Array, lse: Array, scale: float, *window: Any) -> None:
    """Compute as a kernel does."""
    s = scores(q, k, scale, visible(q.shape[1], k.shape[1], *window))
    lse[...] = np.log(np.exp(s).sum(-1))
    out[...] = (np.exp(s - lse[..., None]) @ spread(v, q.shape[2])).transpose(0, 2, 1, 3)


def preprocess(out: Array, d_out: Array, delta: Array, lse: Array, lse_log2: Array, d_q: Array) -> None:
    tokens = lse.shape[2]
    delta[:, :, :tokens] = (out.astype(np.float32) * d_out.astype(np.float32)).sum(-1).transpose(0, 2, 1)
    lse_log2[:, :, :tokens] = lse * math.log2(math.e)
    d_q[...] = 0


def backward(
    q: Array, k: Array, v: Array, d_out: Array, lse_log2: Array, delta: Array, d_q: Array, d_k: Array, d_v: Array,
    scale: float, *window: Any,
) -> None:  # fmt: skip
    """Add to sums in float32 without their scale, but for d_k and d_v of as many heads as q has."""
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    p = np.exp2(scores(q, k, scale, visible(tokens, k.shape[1], *window)) / math.log(2) - lse_log2[:, :, :tokens, None])
    gradient = d_out.astype(np.float32).transpose(0, 2, 1, 3)
    d_s = p * (gradient @ spread(v, heads).swapaxes(2, 3) - delta[:, :, :tokens, None])
    d_q.reshape(*q.shape[::2], -1, q.shape[3])[:, :, :tokens] += d_s @ spread(k, heads)
    for total, share in ((d_k, d_s.swapaxes(2, 3) @ q.transpose(0, 2, 1, 3)), (d_v, p.swapaxes(2, 3) @ gradient)):
        summed = share.reshape(len(q), kv_heads, -1, *share.shape[2:]).sum(2)
        if total.ndim == 4:
            total[...] = (summed * (scale if total is d_k else 1)).transpose(0, 2, 1, 3)
        else:
            total.reshape(len(q), kv_heads, -1, share.shape[3])[:, :, : k.shape[1]] += summed


def convert(total: Array, result: Array, scale: float) -> None:
    batch, tokens, heads, dim = result.shape
    result[...] = scale * total.reshape(batch, heads, -1, dim)[:, :, :tokens].transpose(0, 2, 1, 3)


class Double:
    """The library's module: functions that compile and queue."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

        def function(run: Callable[..., None]) -> Any:
            def call(*arguments: Any, **options: Any) -> None:
                run(*arguments, **options)

            vars(call)["compile_cache"] = {}
            return call

        self._flash_attn_fwd = function(self._forward)
        self._flash_attn_bwd = function(self._backward)
        self._bwd_preprocess, self._bwd_postprocess_convert = function(preprocess), function(convert)

    def is_fake_mode(self) -> bool:
        return True

    def queue(self, function: Any, kernel: Callable[..., None], *arguments: Any) -> None:
        if kernel.__name__ not in function.compile_cache:
            function.compile_cache[kernel.__name__] = kernel
        if not self.is_fake_mode():
            function.compile_cache[kernel.__name__](*arguments)

    def _forward(
        self, q: Array, k: Array, v: Array, *, softmax_scale: float, causal: bool, window_size_left: int | None,
        window_size_right: int | None, out: Array, lse: Array,
    ) -> None:  # fmt: skip
        assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        window = causal, window_size_left, window_size_right
        self.queue(self._flash_attn_fwd, forward, q[...], k[...], v[...], out[...], lse, softmax_scale, *window)

    def _backward(
        self, q: Array, k: Array, v: Array, out: Array, d_out: Array, lse: Array, *, softmax_scale: float,
        causal: bool, window_size_left: int | None, window_size_right: int | None, deterministic: bool, dq: Array,
        dk: Array, dv: Array,
    ) -> None:  # fmt: skip
        assert [x.shape for x in (dq, dk, dv)] == [x.shape for x in (q, k, v)] and out.shape == d_out.shape
        self.told.append({"deterministic": deterministic})
        window = causal, window_size_left, window_size_right
        heads = q.shape[0], q.shape[2]
        tokens, keys = (-(-x.shape[1] // TILE) * TILE for x in (q, k))
        delta, lse_log2 = (np.empty((*heads, tokens), np.float32) for _ in "dl")
        d_q = np.empty((*heads, tokens * q.shape[3]), np.float32)
        self.queue(self._bwd_preprocess, preprocess, out, d_out, delta, lse, lse_log2, d_q)
        sums = [dk, dv]
        if q.shape[2] != k.shape[2]:
            sums = [np.zeros((k.shape[0], k.shape[2], keys * x.shape[3]), np.float32) for x in (k, v)]
        self.queue(
            self._flash_attn_bwd, backward, q[...], k[...], v[...], d_out, lse_log2, delta, d_q, *sums, softmax_scale,
            *window,
        )  # fmt: skip
        self.queue(self._bwd_postprocess_convert, convert, d_q, dq, softmax_scale)
        if sums[0] is not dk:
            self.queue(self._bwd_postprocess_convert, convert, sums[0], dk, softmax_scale)
            self.queue(self._bwd_postprocess_convert, convert, sums[1], dv, 1.0)


def numbers(pointer: int, where: Layout) -> Array:
    """Return the array at an address."""
    there = memoryview((ctypes.c_char * where.nbytes).from_address(pointer))
    dtype = np.dtype(getattr(ml_dtypes, where.dtype, where.dtype))
    strides = tuple(step * dtype.itemsize for step in where.steps)
    result: Array = np.ndarray(where.shape, dtype, there, strides=strides)
    return result


def stand_in(where: Layout) -> Array:
    held = np.full(where.nbytes, 255, np.uint8)
    return numbers(held.ctypes.data, where).view(Held).of(held)


class Held(np.ndarray[Any, Any]):
    """An array that says whose memory its views share."""

    owner: Array

    def of(self, owner: Array) -> Held:
        self.owner = owner
        return self

    def __array_finalize__(self, source: Any) -> None:
        self.owner = getattr(source, "owner", self)


def identity(array: Array) -> int:
    return id(getattr(array, "owner", array))


def layout_of(argument: object) -> Layout | None:
    if not isinstance(argument, np.ndarray):
        return None
    steps = tuple(stride // argument.itemsize for stride in argument.strides)
    return Layout(argument.shape, steps, argument.dtype.name)


class Scratch:
    """Buffers that hold NaN before each call."""

    def buffers(self, sizes: Sequence[int], name: str) -> list[int]:
        self.held = [np.full(size, 255, np.uint8) for size in sizes]
        return [array.ctypes.data for array in self.held]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    """The library, and memory that is NumPy's."""
    found = Double()

    def at(pointer: int, where: Layout, device: int) -> Array:
        return numbers(pointer, where)

    def clear(pointer: int, nbytes: int, stream: int) -> None:
        ctypes.memset(pointer, 0, nbytes)

    def queueing(device: int, stream: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(plans, "loaded", lambda: (found, ""))
    for replaced in (at, clear, queueing, stand_in, identity, layout_of):
        monkeypatch.setattr(memory, replaced.__name__, replaced)
    monkeypatch.setattr(memory, "without_memory", contextlib.nullcontext)
    monkeypatch.setattr(memory, "collecting_warnings", lambda run: run())
    monkeypatch.setattr(memory, "current_stream", lambda: 0)
    plans.build.cache_clear()
    yield found
    plans.build.cache_clear()


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float16)


def apart(array: Array) -> Array:
    """Return a copy whose rows lie apart in memory."""
    wide = np.empty((*array.shape[:3], array.shape[3] + 8), array.dtype)
    wide[..., : array.shape[3]] = array
    return wide[..., : array.shape[3]]


def place(array: Array) -> Place:
    return Place(array.shape, array.strides, array.itemsize)


def run(q: Array, k: Array, v: Array, *more: Array, causal: bool, left: int | None) -> list[Array]:
    """Return (out, lse), or (d_q, d_k, d_v) for further d_out, out, lse, by a plan."""
    plan = plans.build(0, "float16", SCALE, causal, left, *map(place, (q, k, v, *more[:2])))
    assert plan is not None
    if more:
        d_out, out, lse = more
        results = [np.full(x.shape, np.nan, x.dtype) for x in (q, k, v)]
        arrays = [q, k, v, out, d_out, np.ascontiguousarray(lse, np.float32), *results]
    else:
        results = [np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype), np.full(q.shape[:3], np.nan, np.float32)]
        arrays = [q, k, v, *results]
    plan(Scratch(), *(array.ctypes.data for array in arrays))  # type: ignore[arg-type]
    return results


def cut(mask: Mask, queries: Array, keys: Array) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Yield the queries and keys of each piece of a block, and its mask."""
    block = Block(mask, queries, keys)
    start, stop = (bound.astype(np.int32) for bound in block.runs)
    for piece in pieces(start, stop, block) or ():
        yield piece.queries, piece.keys, {"causal": piece.causal, "left": piece.left}


@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize("chosen", layout.LAYOUTS)
@pytest.mark.parametrize("mask", ["full", "causal", "window=11", "window=7,4", "documents=20,0,30,14+causal"])
def test_a_problem_in_pieces(double: Double, mask: str, chosen: str, kv_heads: int) -> None:
    """All blocks of two ranks: (out, lse) merged, then gradients added up, beside NumPy's kernel."""
    tokens, where, plain = 64, parse(mask), NumpyKernel(SCALE)
    q, d_out = draw(BATCH, HEADS, tokens, DIM), draw(BATCH, HEADS, tokens, V_DIM)
    k, v = draw(BATCH, kv_heads, tokens, DIM, seed=1), draw(BATCH, kv_heads, tokens, V_DIM, seed=2)
    chunks = [layout.positions(chosen, tokens, 2, rank) for rank in range(2)]
    state, right = ([np.zeros(d_out.shape, np.float32), np.full(q.shape[:3], -np.inf)] for _ in "sr")
    whole = Block(where, np.arange(tokens), np.arange(tokens))
    plain.forward(q, k, v, block=whole, out=right[0], lse=right[1])
    for mine in chunks:
        near = [array[:, :, mine] for array in state]
        for theirs in chunks:
            for rows, seen, how in cut(where, mine, theirs):
                parts = apart(q[:, :, mine[rows]]), k[:, :, theirs[seen]], apart(v[:, :, theirs[seen]])
                out, lse = run(*parts, **how)
                merge(near[0][:, :, rows], near[1][:, :, rows], out.astype(np.float32), lse.astype(np.float64))
        for array, part in zip(state, near, strict=True):
            array[:, :, mine] = part
    for result, expected in zip(state, right, strict=True):
        np.testing.assert_allclose(result, expected, atol=3e-3, rtol=3e-3)
    rounded, lse = state[0].astype(np.float16), right[1]
    delta = (rounded.astype(np.float32) * d_out).sum(-1)
    sums, exact = ([np.zeros(array.shape, np.float32) for array in (q, k, v)] for _ in "se")
    d_q, d_k, d_v = exact
    plain.backward(q, k, v, block=whole, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v)
    for mine in chunks:
        for theirs in chunks:
            for rows, seen, how in cut(where, mine, theirs):
                a, b = mine[rows], theirs[seen]
                given = q[:, :, a], apart(k[:, :, b]), v[:, :, b], apart(d_out[:, :, a]), rounded[:, :, a], lse[:, :, a]
                for total, at, share in zip(sums, (a, b, b), run(*given, **how), strict=True):
                    total[:, :, at] += share
    for result, wanted in zip(sums, exact, strict=True):
        np.testing.assert_allclose(result, wanted, atol=0.02, rtol=0.02)


def test_a_plan_serves_other_arrays_of_its_shapes(double: Double) -> None:
    """At other addresses, also where two arrays are one, as q, k and v may be; what it found it finds once."""
    shapes = [(1, HEADS, 24, DIM)] * 3
    for seed in range(3):
        q, k, v = (draw(*shape, seed=3 * seed + i) for i, shape in enumerate(shapes))
        for arrays in ((q, k, v), (q, q, q), (k, q, q)):
            out, lse = run(*arrays, causal=True, left=None)
            wanted, wanted_lse = np.zeros(out.shape, np.float32), np.full(lse.shape, -np.inf)
            block = Block(parse("causal"), np.arange(24), np.arange(24))
            NumpyKernel(SCALE).forward(*arrays, block=block, out=wanted, lse=wanted_lse)
            np.testing.assert_allclose(out, wanted, atol=3e-3)
    assert plans.build.cache_info().misses == 1


def test_a_plan_keeps_some_addresses(double: Double) -> None:
    plan = plans.build(0, "float16", SCALE, False, None, *[Place.packed((1, 2, 8, 8), np.float16)] * 3)
    assert plan is not None
    arrays = [draw(1, 2, 8, 8, seed=seed) for seed in range(plans.KEPT + 2)]
    for array in arrays:
        plan._tensor(0, array.ctypes.data)
    assert len(plan.known[0]) == 2
    first = plan._tensor(0, arrays[-1].ctypes.data)
    assert plan._tensor(0, arrays[-1].ctypes.data) is first


def test_deterministic_is_passed_on(double: Double) -> None:
    like = [Place.packed((1, 2, 8, 8), np.float16)] * 5
    for wanted in (False, True):
        plans.build(0, "float16", SCALE, True, None, *like, deterministic=wanted)
    assert [told["deterministic"] for told in double.told] == [False, True]


def test_a_refusal_leaves_the_library_as_it_was(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [getattr(double, name).compile_cache for name in library.QUEUES]
    with pytest.raises(RuntimeError, match="no such kernel"), launches.written_down(double):
        raise RuntimeError("no such kernel")
    assert all(getattr(double, name).compile_cache is cache for name, cache in zip(library.QUEUES, caches, strict=True))
    assert double.is_fake_mode()
    monkeypatch.setattr(memory, "stand_in", lambda where: 1 / 0)
    with pytest.warns(UserWarning, match=r"can't do \(1, 2, 8, 8\).*division by zero; CuPy's kernel does"):
        assert plans.build(0, "float16", SCALE, True, None, *[Place.packed((1, 2, 8, 8), np.float16)] * 3) is None


def posed(dtype: str, dim: int = 64, v_dim: int = 64, kv_heads: int = 2) -> Problem:
    return Problem(
        1, 1, 2, kv_heads, dim, v_dim, 8, 8, np.dtype(getattr(ml_dtypes, dtype, dtype)), "zigzag", parse("causal")
    )


def test_what_it_can_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "loaded", lambda: (None, "torch is not installed"))
    monkeypatch.setattr(library, "generation", lambda: 9)
    assert "not float32" in library.unable(posed("float32"))
    assert "above zero, not -1" in library.unable(posed("bfloat16"), -1.0)
    assert library.unable(posed("bfloat16")) == "torch is not installed"
    monkeypatch.setattr(library, "loaded", lambda: (Double(), ""))
    assert library.unable(posed("bfloat16")) == library.unable(posed("float16", 256, 64), 2.0) == ""
    for dims in ((64, 128), (64, 32), (128, 96)):
        assert f"with a smaller v_head_dim, not {dims}" in library.unable(posed("float16", *dims))
    assert "v_head_dim of 32, 64, ..., 256 on this chip, not 4" in library.unable(posed("float16", 32, 4))
    for dim in (8, 16, 24, 40, 80, 112):
        assert f"head_dim of 32, 64, ..., 256 on this chip, not {dim}" in library.unable(posed("bfloat16", dim, dim))
    assert library.unable(posed("float16", kv_heads=1)) == ""
    assert "as many K/V heads as query heads" in library.unable(posed("float16", 128, 64, kv_heads=1))
    monkeypatch.setattr(library, "generation", lambda: 10)
    assert "head_dim of 8, 16, ..., 128 on this chip, not 192" in library.unable(posed("float16", 192, 192))
    assert library.unable(posed("float16", 192, 128)) == ""
    monkeypatch.setattr(library, "generation", lambda: 8)
    assert "not 8" in library.unable(posed("float16"))


def test_the_fastest_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4, else cuDNN; asked for by name, it says what it lacks."""
    lacks: dict[str, str] = {}

    def by_library(name: str, *others: Any) -> tuple[str, Any]:
        return (lacks[name], None) if name in lacks else ("", name)

    monkeypatch.setattr(kernels, "_by_library", by_library)
    chosen: Callable[..., Any] = kernels.choose
    assert chosen("cupy", posed("bfloat16")) == chosen("cupy", posed("bfloat16"), None, "flash4") == "flash4"
    assert chosen("cupy", posed("bfloat16"), None, "cudnn") == "cudnn"
    assert chosen("cupy", posed("bfloat16"), deterministic=True) == "flash4"
    lacks["flash4"] = "torch is not installed"
    assert chosen("cupy", posed("bfloat16")) == "cudnn"
    with pytest.raises(InputError, match="kernel 'flash4' can't do this: torch is not installed; kernel 'cupy' can"):
        chosen("cupy", posed("bfloat16"), None, "flash4")
    with pytest.raises(InputError, match="kernel 'cudnn' has no fixed order of sums: numpy, cupy, flash4 can"):
        chosen("cupy", posed("bfloat16"), None, "cudnn", deterministic=True)
    with pytest.raises(InputError, match="kernel 'flash4' has no softcap: numpy, cupy can"):
        chosen("cupy", posed("bfloat16"), None, "flash4", softcap=20.0)


def test_kernels_on_gpus_are_named_without_loading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they tried, where nothing is to compute on GPUs."""

    def loads() -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "gpus", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(kernels, "version", lambda name: "4.0")
    monkeypatch.setattr(cudnn, "loaded", lambda: (None, "nvidia-cudnn-frontend is not installed"))
    monkeypatch.setattr(library, "generation", lambda: 9)
    monkeypatch.setattr(library, "loaded", loads)
    monkeypatch.setattr(library, "found", lambda name: name)
    assert kernels.on_gpus(False).startswith("flash4 4.0: float16, bfloat16; else cupy; no cudnn: nvidia-cudnn")
    monkeypatch.setattr(library, "found", lambda name: None if name == "cutlass" else name)
    assert kernels.on_gpus(False).startswith("cupy; no flash4: cutlass is not installed")
    monkeypatch.setattr(library, "found", lambda name: name)
    with pytest.raises(AssertionError, match="loaded"):
        kernels.on_gpus(True)
