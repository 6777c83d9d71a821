"""The oracle: against numbers worked out by hand, and its gradients against finite differences."""

import numpy as np
import pytest

from mpiattn.conformance import oracle
from mpiattn.problems.mask import Causal, Documents, Full, Mask, SlidingWindow


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
