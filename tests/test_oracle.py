"""The oracle: against numbers worked out by hand, and its gradients against finite differences."""

import ast
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiattn.conformance import dropped, oracle
from mpiattn.conformance.user_masks import Ahead, Chunks, Prefix
from mpiattn.conformance.visible import visible
from mpiattn.problems.dropout import Dropout
from mpiattn.problems.mask import Causal, Documents, Full, Intersection, Mask, SlidingWindow


def test_two_keys_by_hand() -> None:
    q = np.array([[[[2.0]]]])
    k = np.array([[[[0.0], [np.log(3.0) / 2]]]])
    v = np.array([[[[4.0, 0.0], [0.0, 8.0]]]])
    out, lse = oracle.attention(q, k, v, Full())  # weights 1/4 and 3/4
    assert np.allclose(out, [[[[1.0, 6.0]]]], atol=1e-15) and np.allclose(lse, np.log(4.0), atol=1e-15)


def test_a_query_without_keys() -> None:
    q = k = v = np.ones((1, 1, 3, 2))
    out, lse = oracle.attention(q, k[:, :, :0], v[:, :, :0], Full())
    assert not out.any() and np.all(lse == -np.inf)
    d_q, d_k, _ = oracle.gradients(q, k[:, :, :0], v[:, :, :0], q, Full())
    assert not d_q.any() and d_k.shape == (1, 1, 0, 2)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(2, 1), Documents([4, 3])], ids=str)
def test_gradients_are_those_of_finite_differences(mask: Mask) -> None:
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((2, heads, 7, 3)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    d_out = rng.standard_normal((2, 4, 7, 3))
    gradients = oracle.gradients(inputs["q"], inputs["k"], inputs["v"], d_out, mask, 0.7)
    for (name, array), gradient in zip(inputs.items(), gradients, strict=True):
        direction = rng.standard_normal(array.shape)
        values = []
        for step in (1e-5, -1e-5):
            q, k, v = (inputs | {name: array + step * direction}).values()
            values.append((oracle.attention(q, k, v, mask, 0.7)[0] * d_out).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-8)


def test_some_queries_are_those_of_all() -> None:
    q, k, v, d_out = np.random.default_rng(1).standard_normal((4, 1, 2, 11, 4))
    some = np.array([0, 3, 10])
    out, _ = oracle.attention(q, k, v, Causal())
    assert np.array_equal(oracle.attention(q, k, v, Causal(), queries=some)[0], out[:, :, some])
    others = np.setdiff1d(np.arange(11), some)
    d_out[:, :, others] = 0
    whole = oracle.gradients(q, k, v, d_out, Causal())
    part = oracle.gradients(q, k, v, d_out[:, :, some], Causal(), queries=some)
    assert np.allclose(part[0], whole[0][:, :, some]) and np.allclose(part[1], whole[1])
    assert np.allclose(part[2], whole[2])


# What it must not share with what it judges

DOCUMENT = [0] * 4 + [2] * 5 + [3] * 2

MEANINGS: list[tuple[Mask, Callable[[int, int], bool]]] = [
    (Full(), lambda q, k: True),
    (Causal(), lambda q, k: k <= q),
    (SlidingWindow(3, 1), lambda q, k: q - 3 <= k <= q + 1),
    (SlidingWindow(3, sys.maxsize), lambda q, k: q - 3 <= k),
    (SlidingWindow(10**30, 2), lambda q, k: k <= q + 2),
    (SlidingWindow(math.inf), lambda q, k: k <= q),
    (Documents([4, 0, 5, 2]), lambda q, k: DOCUMENT[q] == DOCUMENT[k]),
    (Documents([4, 0, 5, 2]) & Causal(), lambda q, k: DOCUMENT[q] == DOCUMENT[k] and k <= q),
    (
        SlidingWindow(1, 8) & Causal() & Documents([4, 0, 5, 2]),
        lambda q, k: DOCUMENT[q] == DOCUMENT[k] and 0 <= q - k <= 1,
    ),
    (Prefix(6), lambda q, k: k <= q or k < 6),
    (Chunks(4), lambda q, k: k // 4 <= q // 4),
    (Ahead(2) & Causal(), lambda q, k: q - 2 <= k <= q),
]


@pytest.mark.parametrize(("mask", "sees"), MEANINGS, ids=[str(number) for number in range(len(MEANINGS))])
def test_masks_mean_what_they_say(mask: Mask, sees: Callable[[int, int], bool]) -> None:
    expected = np.array([[sees(q, k) for k in range(11)] for q in range(11)])
    some, few = np.array([0, 3, 4, 10]), np.array([1, 9])
    assert np.array_equal(visible(mask, np.arange(11), np.arange(11)), expected)
    assert np.array_equal(visible(mask, some, few), expected[np.ix_(some, few)])
    assert np.array_equal(visible(expected, some, few), expected[np.ix_(some, few)])


def test_the_oracle_asks_no_mask_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise AssertionError("the oracle uses what it judges")

    for kind in (Full, Causal, SlidingWindow, Documents, Intersection):
        monkeypatch.setattr(kind, "bounds", broken)
    for name in ("mpiattn.problems.mask.allowed", "mpiattn.problems.dropout.philox"):
        monkeypatch.setattr(name, broken)
    monkeypatch.setattr(Dropout, "kept", broken)
    q, k, v, d_out = np.random.default_rng(0).standard_normal((4, 1, 2, 11, 3))
    for mask, _ in MEANINGS[:9]:
        out, _ = oracle.attention(q, k, v, mask, dropout=Dropout(0.3, 5))
        gradients = oracle.gradients(q, k, v, d_out, mask, dropout=Dropout(0.3, 5))
        assert np.isfinite(out).all() and all(np.isfinite(gradient).all() for gradient in gradients)


def test_what_the_oracle_imports() -> None:
    """Of the package only classes of masks, and for the types alone Dropout."""
    names = set()
    for module in (oracle, dropped, sys.modules[visible.__module__]):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names |= {alias.name for alias in node.names}
    assert names == {"Causal", "Documents", "Dropout", "Full", "Intersection", "Mask", "Positions", "SlidingWindow"}


def test_documents_of_another_length_are_no_index_error() -> None:
    q = np.ones((1, 1, 64, 2))
    with pytest.raises(ValueError, match="a token at 63 is in none of the documents of 20 tokens"):
        oracle.attention(q, q, q, Documents([10, 10]))


def test_the_oracle_of_dropout() -> None:
    """Random123's own test vectors of philox4x32-10, and what the kernels drop, far out in the sequence too."""
    for counter, key, words in (
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        x0, x1, x2, x3 = map(np.uint64, counter)
        drawn = dropped.random123(x0, x1, x2, x3, *key)
        assert " ".join(f"{int(word):08x}" for word in drawn) == words
    queries, keys = (
        np.array([0, 5, 2**31 + 3, 2**32 + 1, 2**62]),
        np.array([0, 1, 2, 3, 9, 2**33 + 2, 2**35 + 1, 2**62 + 3]),
    )
    for dropout in (Dropout(0.0), Dropout(0.3, 2**64 - 1), Dropout(0.7, 0xDEADBEEF_01234567)):
        right = dropped.kept(dropout.rate, dropout.seed, 3, 11, queries, keys)
        assert np.array_equal(dropout.kept(3, 11, queries, keys), right)
