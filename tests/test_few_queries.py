"""A few queries that see a whole block of keys: computed in one product, or where that is not precise, in tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiattn import Full, SlidingWindow
from mpiattn.arrays import Array
from mpiattn.conformance import oracle
from mpiattn.kernels.numpy import few, kernel
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.problems.block import Block

TOLERANCES = {"float64": 1e-13, "float32": 2e-6}


def attend(q: Array, cache: Array, cuts: list[int], mask: Any = Full()) -> tuple[Array, Array]:  # noqa: B008
    """Attend to a cache with room beyond its tokens, part after part."""
    out, lse = np.zeros((*q.shape[:3], cache.shape[4]), q.dtype), np.full(q.shape[:3], -np.inf)
    last, kernel = np.arange(cache.shape[3] - q.shape[2], cache.shape[3]), NumpyKernel()
    for start, stop in zip([0, *cuts], [*cuts, cache.shape[3]], strict=True):
        block = Block(mask, last, np.arange(start, stop))
        kernel.forward(q, *cache[:, :, :, start:stop], block=block, out=out, lse=lse)
    return out, lse


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(9, 3, 1), (4, 4, 3), (6, 1, 2)])
def test_values(monkeypatch: pytest.MonkeyPatch, dtype: str, heads: int, kv_heads: int, queries: int) -> None:
    """No tile is planned, and out and lse are right, of a whole cache and of its parts."""
    rng = np.random.default_rng(0)
    q = 3 * rng.standard_normal((2, heads, queries, 16)).astype(dtype)
    cache = rng.standard_normal((2, 2, kv_heads, 300, 16)).astype(dtype)
    right_out, right_lse = oracle.attention(q, cache[0], cache[1], Full())

    def unplanned(block: Block, group: int) -> Any:
        raise AssertionError("tiles")

    monkeypatch.setattr(kernel, "plan", unplanned)
    for cuts in ([], [100, 200]):
        out, lse = attend(q, cache, cuts)
        assert out.dtype == dtype and np.abs(out - right_out).max() < TOLERANCES[dtype]
        assert np.abs(lse - right_lse).max() < 10 * TOLERANCES[dtype]
    with pytest.raises(AssertionError, match="tiles"):
        attend(q, cache, [], SlidingWindow(7))


@pytest.mark.parametrize("what", ["large", "nan"])
def test_scores_that_are_not_precise_enough(what: str) -> None:
    """Nothing is done, and the tiles do it."""
    q = np.ones((1, 1, 1, 4), np.float32)
    k = np.linspace(0, 1, 400, dtype=np.float32).reshape(1, 1, 100, 4) * (1000 if what == "large" else 1)
    k[0, 0, 5] = k[0, 0, 5] if what == "large" else np.nan
    out, lse = np.zeros((1, 1, 1, 4), np.float32), np.full((1, 1, 1), -np.inf)
    assert not few.attend(q, k, k, 0.5, out, lse) and not out.any() and np.isneginf(lse).all()
    out, _ = attend(q, np.stack([k, k]), [])
    assert np.isnan(out).all() if what == "nan" else np.abs(out - k[:, :, -1:]).max() < 1e-3
