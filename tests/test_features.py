"""Softcap, sinks and dropout: the NumPy kernel against the oracle, the oracle against finite differences.

That every algorithm has them is for the conformance matrix (test_conformance.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mpiattn import ALGORITHMS, RingAttention
from mpiattn.arrays import accumulator, softmax
from mpiattn.conformance import oracle
from mpiattn.conformance.case import Case, fast
from mpiattn.conformance.check import check
from mpiattn.conformance.player import Refused
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.problems import layout as layouts
from mpiattn.problems.block import Block
from mpiattn.problems.dropout import Dropout, philox
from mpiattn.problems.mask import Causal, Documents, Full, Mask, SlidingWindow
from mpiattn.trace.comm import TracedComm

Array = NDArray[Any]
NAMES = "out", "lse", "d_q", "d_k", "d_v", "d_sinks"
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}

FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 3.0},
    "weak softcap": {"softcap": 100.0},
    "dropout": {"dropout": Dropout(0.3, 2**63 + 5)},
    "sinks": {"sinks": True},
    "all": {"softcap": 50.0, "dropout": Dropout(0.5, 1), "sinks": True},
}


def inputs(tokens: int, dtype: str = "float64", dims: tuple[int, int] = (8, 12), seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    shapes = (2, 4, tokens, dims[0]), (2, 2, tokens, dims[0]), (2, 2, tokens, dims[1]), (2, 4, tokens, dims[1])
    return [random.standard_normal(shape).astype(dtype) for shape in (*shapes, (4,))]


def kernel_results(
    arrays: list[Array], mask: Mask, layout: str, ranks: int, softcap: float | None = None,
    dropout: Dropout | None = None, sinks: bool = False, scale: float | None = None, shares: int = 1,
) -> list[Array]:  # fmt: skip
    """Run the kernel on all pairs of chunks, on a share of the heads at a time."""
    q, k, v, d_out, logits = arrays
    wide = accumulator(q.dtype)
    out, lse = np.zeros((*q.shape[:3], v.shape[3]), wide), np.full(q.shape[:3], -np.inf)
    d_q, d_k, d_v = (np.zeros(x.shape, wide) for x in (q, k, v))
    d_sinks = np.zeros(q.shape[1], wide)
    chunks = [layouts.positions(layout, q.shape[2], ranks, rank) for rank in range(ranks)]
    kernel = NumpyKernel(scale, softcap)
    for heads, kv_heads in (layouts.heads(q.shape[1], k.shape[1], shares, share) for share in range(shares)):
        kernel.drop(dropout, heads.start)
        for i in chunks:
            part, part_lse = out[:, heads, i], lse[:, heads, i]
            for j in chunks:
                near = k[:, kv_heads, j], v[:, kv_heads, j]
                kernel.forward(q[:, heads, i], *near, block=Block(mask, i, j), out=part, lse=part_lse)
            if sinks:
                part, part_lse = softmax.with_sinks(part, part_lse, logits[heads])
            out[:, heads, i], lse[:, heads, i] = part, part_lse
            delta = softmax.delta(d_out[:, heads, i], part)
            if sinks:
                d_sinks[heads] += softmax.sink_gradient(logits[heads], part_lse, delta)
            part_q = d_q[:, heads, i]
            for j in chunks:
                near = k[:, kv_heads, j], v[:, kv_heads, j]
                part_k, part_v = d_k[:, kv_heads, j], d_v[:, kv_heads, j]
                kernel.backward(
                    q[:, heads, i], *near, block=Block(mask, i, j), d_out=d_out[:, heads, i], lse=part_lse,
                    delta=delta, d_q=part_q, d_k=part_k, d_v=part_v,
                )  # fmt: skip
                d_k[:, kv_heads, j], d_v[:, kv_heads, j] = part_k, part_v
            d_q[:, heads, i] = part_q
    return [out, lse, d_q, d_k, d_v, d_sinks]


def expected(arrays: list[Array], mask: Mask, scale: float | None = None, **features: Any) -> list[Array]:
    q, k, v, d_out, logits = arrays
    features["sinks"] = logits if features.get("sinks") else None
    d_sinks = oracle.sink_gradient(q, k, v, d_out, mask, scale, **features)
    return [
        *oracle.attention(q, k, v, mask, scale, **features),
        *oracle.gradients(q, k, v, d_out, mask, scale, **features),
        d_sinks if features["sinks"] is not None else np.zeros_like(d_sinks),
    ]


def compare(results: list[Array], right: list[Array], tolerance: float) -> None:
    for name, result, reference in zip(NAMES, results, right, strict=True):
        infinite = np.isneginf(reference)
        np.testing.assert_array_equal(np.isneginf(result), infinite)
        error = oracle.error(np.where(infinite, 0, result), np.where(infinite, 0, reference))
        assert error <= tolerance, f"error of {name} {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(40), Documents([0, 150, 7, 143]) & Causal()], ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_kernel_against_the_oracle(features: dict[str, Any], mask: Mask, dtype: str) -> None:
    arrays = inputs(300, dtype)
    right = expected(arrays, mask, **features)
    for layout, ranks, shares in (("contiguous", 1, 1), ("zigzag", 3, 2), ("striped", 2, 3)):
        results = kernel_results(arrays, mask, layout, ranks, **features, shares=shares)
        compare(results, right, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-3)])
@pytest.mark.parametrize("softcap", [0.1, 5.0, 60.0, 1e4])
def test_softcap_of_large_scores(softcap: float, dtype: str, tolerance: float) -> None:
    """Saturated and not, with a shift of the softmax and without. In float32 scores of hundreds are rounded to 1e-5."""
    arrays = inputs(200, dtype)
    arrays[0] *= 60
    right = expected(arrays, Causal(), softcap=softcap)
    compare(kernel_results(arrays, Causal(), "zigzag", 2, softcap), right, tolerance)


def test_a_large_softcap_changes_nothing() -> None:
    arrays = inputs(100)
    compare(kernel_results(arrays, Causal(), "zigzag", 2, 1e7), kernel_results(arrays, Causal(), "zigzag", 2), 1e-10)


def test_sinks_without_keys() -> None:
    """A query that attends to nothing has out = 0 and the sink as its lse; sinks of -inf are none at all."""
    out, lse = np.zeros((1, 2, 3, 4)), np.full((1, 2, 3), -np.inf)
    out, lse = softmax.with_sinks(out, lse, np.array([0.5, -np.inf]))
    assert not out.any()
    np.testing.assert_array_equal(lse[0], [[0.5] * 3, [-np.inf] * 3])
    np.testing.assert_array_equal(softmax.sink_gradient(np.array([0.5, -np.inf]), lse, np.zeros((1, 2, 3))), 0)
    arrays = inputs(20)
    plain = kernel_results(arrays, Causal(), "zigzag", 2)
    arrays[4][:] = -np.inf
    compare(kernel_results(arrays, Causal(), "zigzag", 2, sinks=True), plain, 0)


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_extreme_sinks(sink: float) -> None:
    arrays = inputs(50, "float32")
    arrays[4][:] = sink
    compare(
        kernel_results(arrays, Causal(), "zigzag", 2, sinks=True)[:2] + [np.zeros(1)] * 4,
        expected(arrays, Causal(), sinks=True)[:2] + [np.zeros(1)] * 4,
        2e-5,
    )


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_oracle_by_finite_differences(features: dict[str, Any]) -> None:
    mask = Causal() & SlidingWindow(9)
    arrays = inputs(30, dims=(4, 3))
    _, _, *gradients = expected(arrays, mask, **features)
    random = np.random.default_rng(1)
    for number, gradient in zip((0, 1, 2, 4), gradients, strict=True):
        direction = random.standard_normal(gradient.shape)
        loss = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[number] = moved[number] + step * direction
            loss.append((expected(moved, mask, **features)[0] * arrays[3]).sum())
        assert (loss[0] - loss[1]) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-7)


# Dropout


def test_philox_known_answers() -> None:
    """Random123's own test vectors of philox4x32-10."""
    for counter, key, words in (
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        assert " ".join(f"{int(word):08x}" for word in philox([np.uint64(c) for c in counter], key)) == words


def test_kept_as_documented() -> None:
    """One at a time, in Python's own integers, far out in the sequence too."""
    dropout = Dropout(0.7, 0xDEADBEEF_01234567)
    queries, keys = np.array([0, 5, 2**31 + 3]), np.array([0, 1, 2, 3, 9, 2**33 + 2])
    kept = dropout.kept(3, 11, queries, keys)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            counter = [np.uint64(word) for word in (key // 4, query, 11, 3)]
            word = philox(counter, (0x01234567, 0xDEADBEEF))[key % 4]
            assert kept[i, j] == (int(word) >= int(0.7 * 2**32))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_rate_of_dropout(rate: float) -> None:
    positions = np.arange(2000)
    kept = Dropout(rate, 17).kept(0, 0, positions, positions)
    deviation = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) <= 5 * deviation
    # Each row and each column, too.
    for axis in (0, 1):
        chi_squared = ((kept.mean(axis=axis) - (1 - rate)) ** 2).sum() / max(rate * (1 - rate) / 2000, 1e-30)
        assert chi_squared <= 2000 + 5 * np.sqrt(2 * 2000)


def test_decisions_are_independent() -> None:
    """Of neighbours along each axis, of other heads, batches, seeds: no correlation beyond chance."""
    positions = np.arange(1024)
    kept = partial(Dropout(0.4, 3).kept, queries=positions, keys=positions)
    one = kept(0, 0) - 0.6
    others = [one.T, one[::-1], *(np.roll(one, shift, axis) for shift in (1, 2, 4, 64) for axis in (0, 1))]
    others += [kept(*place) - 0.6 for place in ((0, 1), (1, 0), (1, 1), (0, 2))]
    others += [Dropout(0.4, seed).kept(0, 0, positions, positions) - 0.6 for seed in (2, 4, 2**32 + 3)]
    for other in others:
        correlation = (one * other).mean() / 0.24
        assert abs(correlation) <= 5 / np.sqrt(one.size)


def test_same_decisions_wherever_they_are_made() -> None:
    dropout, positions = Dropout(0.5, 9), np.arange(101)
    whole = dropout.kept(1, 2, positions, positions)
    for layout in layouts.LAYOUTS:
        for ranks in (2, 5, 200):
            chunks = [layouts.positions(layout, 101, ranks, rank) for rank in range(ranks)]
            for queries in chunks[:7]:
                for keys in chunks[-7:]:
                    np.testing.assert_array_equal(dropout.kept(1, 2, queries, keys), whole[np.ix_(queries, keys)])


def test_expectation_of_dropout() -> None:
    """The mean over seeds is attention without dropout."""
    q, k, v, *_ = inputs(16)
    plain, lse = oracle.attention(q, k, v, Full())
    outs = []
    for seed in range(400):
        out, same = oracle.attention(q, k, v, Full(), dropout=Dropout(0.25, seed))
        np.testing.assert_array_equal(same, lse)
        outs.append(out)
    deviation = np.std(outs, axis=0) / np.sqrt(len(outs))
    assert (np.abs(np.mean(outs, axis=0) - plain) <= 6 * deviation).all()


@pytest.mark.parametrize("arguments", [(1.0,), (-0.1,), (float("nan"),), (0.1, -1), (0.1, 2**64), (0.1, 0.5)])
def test_bad_dropout(arguments: Any) -> None:
    with pytest.raises(ValueError, match="dropout"):
        Dropout(*arguments)


# On several ranks


def share(attention: Any, tokens: int = 12, seed: int = 0) -> list[Array]:
    """Return this rank's q, k, v, d_out, and sinks of all heads."""
    *arrays, sinks = inputs(tokens, seed=seed)
    return [*(np.ascontiguousarray(array[:, :, attention.positions(tokens)]) for array in arrays), sinks]


@pytest.mark.mpi(max_size=4)
def test_backward_drops_what_its_forward_dropped(comm: Any) -> None:
    """Whatever has been computed in between, as with one object for many layers; and None drops nothing."""
    with RingAttention(comm) as attention:
        q, k, v, d_out, _ = share(attention)
        runs = [attention.forward(q, k, v, dropout=Dropout(0.5, seed)) for seed in (1, 2)]
        plain, saved = attention.forward(q, k, v)
        gradients = [attention.backward(d_out, s) for _, s in (*runs, (plain, saved))]
        again, _ = attention.forward(q, k, v, dropout=Dropout(0.0, 3))
    np.testing.assert_array_equal(again, plain)
    q, k, v, d_out, _ = inputs(12)
    for dropout, d_q in zip((Dropout(0.5, 1), Dropout(0.5, 2), None), (g[0] for g in gradients), strict=True):
        right = oracle.gradients(q, k, v, d_out, Full(), dropout=dropout)[0][:, :, attention.positions(12)]
        assert oracle.error(d_q, right) <= 1e-10


@pytest.mark.mpi(max_size=4)
def test_bad_partials(comm: Any) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    with pytest.raises(ValueError, match="unknown partials 'half': choose from wide, narrow"):
        RingAttention(comm, partials="half" if last else "wide")


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize(("name", "gain"), [("ring", 2), ("double_ring", 2), ("allgather", 1)])
def test_narrow_partial_sums_take_half_the_bytes(comm: Any, name: str, gain: int) -> None:
    q, k, v, d_out = (np.ones((1, 2, 8, 4), ml_dtypes.bfloat16) for _ in range(4))
    sums = []
    for partials in ("wide", "narrow"):
        traced = TracedComm(comm)
        with ALGORITHMS[name](traced, partials=partials) as attention:
            _, saved = attention.forward(q, k, v)
            kv = traced.trace.received()[1]
            attention.backward(d_out, saved)
            sums.append(traced.trace.received()[1] - 2 * kv)
    assert sums[0] == gain * sums[1] > 0


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("softcap", [0, -1.0, float("nan"), float("inf"), "2"])
def test_bad_softcap(comm: Any, softcap: Any) -> None:
    with pytest.raises(ValueError, match="softcap is a number above 0"):
        RingAttention(comm, softcap=softcap if comm.Get_rank() == comm.Get_size() - 1 else 1.0)


@pytest.mark.mpi(min_size=2, max_size=4)
def test_ranks_must_be_given_the_same(comm: Any) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    with pytest.raises(ValueError, match=r"softcap is 2.0 on rank \d and 1.0 on rank 0"):
        RingAttention(comm, softcap=2.0 if last else 1.0)
    with RingAttention(comm) as attention:
        q, k, v, d_out, sinks = share(attention)
        wrong: list[tuple[str, Any, Any]] = [
            ("dropout", Dropout(0.5, 1), Dropout(0.5, 2)),
            ("dropout", Dropout(0.5, 1), Dropout(0.25, 1)),
            ("dropout", Dropout(0.5, 1), None),
            ("dropout", Dropout(0.5, 1), 0.5),
            ("sinks", sinks, None),
            ("sinks", sinks, sinks[:-1]),
            ("sinks", sinks, sinks + 1),
            ("sinks", sinks, list(sinks)),
        ]
        for name, others, own in wrong:
            with pytest.raises(ValueError, match=f"{name} on rank {comm.Get_size() - 1}"):
                attention.forward(q, k, v, **{name: own if last else others})
        _, saved = attention.forward(q, k, v)
        with pytest.raises(ValueError, match="no sinks"):
            attention.sink_gradient(d_out, saved)


@pytest.mark.mpi(max_size=4)
def test_refusals_count_apart(comm: Any) -> None:
    """An implementation without the features is asked for them, refuses, and passes all the same."""

    class Plain(RingAttention):
        def __init__(self, comm: Any, *, layout: str, mask: Mask, scale: float | None) -> None:
            super().__init__(comm, layout=layout, mask=mask, scale=scale)

        def forward(self, q: Array, k: Array, v: Array) -> Any:  # type: ignore[override]
            return super().forward(q, k, v)

    for case in fast():
        if case.optional:
            with pytest.raises(Refused):
                check(Plain, comm, case)
    check(Plain, comm, Case(layout="zigzag"))


@pytest.mark.mpi(sizes=[3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_wrong_decisions_are_found(comm: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of conformance sees a head number that is off by one on rank 0."""
    drop = NumpyKernel.drop

    def off(kernel: NumpyKernel, dropout: Dropout | None, first_head: int = 0) -> None:
        drop(kernel, dropout, first_head + (comm.Get_rank() == 0))

    monkeypatch.setattr(NumpyKernel, "drop", off)
    case = Case(dropout=0.4, heads=6, kv_heads=3)
    with pytest.raises(AssertionError, match="error of"):
        check(partial(ALGORITHMS[name]), comm, case)
