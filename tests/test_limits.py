"""Results that no error can warn of, as docs/limits.md has them, and what docs/choosing.md does against some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpiattn
from mpiattn.conformance import oracle


@pytest.mark.mpi(max_size=4)
def test_where_a_nan_in_v_goes(comm: Any) -> None:
    """To all that see it, to queries of their tiles, and no further: not to other heads, documents, earlier tiles."""
    tokens, at = 3000, 2500
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, tokens, 4))
    v[0, 0, at, 1] = np.nan
    mask = mpiattn.Causal() & mpiattn.Documents([2900, 100])
    with mpiattn.RingAttention(comm, mask=mask, layout="contiguous") as attention:
        mine = attention.positions(tokens)
        out, _ = attention.forward(q[:, :, mine], k[:, :, mine], v[:, :, mine])
    assert np.isnan(out[0, 0, (mine >= at) & (mine < 2900), 1]).all()
    assert np.isfinite(out[0, 0, mine < at - 512]).all() and np.isfinite(out[0, 0, mine >= 2900]).all()
    assert np.isfinite(out[0, 1]).all()


@pytest.mark.mpi(min_size=2, max_size=4)
def test_contiguous_shares_need_a_contiguous_layout(comm: Any) -> None:
    """The default layout of a causal mask takes them for other tokens: the result is that of another sequence."""
    tokens = 8 * comm.Get_size()
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, tokens, 4))
    mine = np.array_split(np.arange(tokens), comm.Get_size())[comm.Get_rank()]
    own = q[:, :, mine], k[:, :, mine], v[:, :, mine]
    with mpiattn.RingAttention(comm, mask=mpiattn.Causal(), layout="contiguous") as attention:
        right, _ = oracle.attention(q, k, v, mpiattn.Causal())
        assert oracle.error(attention.forward(*own)[0], right[:, :, mine]) < 1e-12
    with mpiattn.RingAttention(comm, mask=mpiattn.Causal()) as attention:
        taken_for = np.concatenate(comm.allgather(attention.positions(tokens)))
        q, k, v = (array[:, :, np.argsort(taken_for)] for array in (q, k, v))
        other, _ = oracle.attention(q, k, v, mpiattn.Causal())
        out, _ = attention.forward(*own)
        assert oracle.error(out, other[:, :, attention.positions(tokens)]) < 1e-12
        assert oracle.error(out, right[:, :, mine]) > 0.01


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ["dense", "ring", "mesh", "ulysses"])
def test_causal_is_of_the_upper_left_corner(comm: Any, name: str) -> None:
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, count, 4)) for count in (2, 5, 5))
    with mpiattn.ALGORITHMS[name](comm, mask=mpiattn.Causal()) as attention:
        queries, keys = attention.positions(2), attention.positions(5)
        out, _ = attention.forward(q[:, :, queries], k[:, :, keys], v[:, :, keys])
    first = out[:, :, queries == 0]
    np.testing.assert_allclose(first, np.broadcast_to(v[:, :, :1], first.shape) if first.size else first, rtol=1e-15)
    both = np.exp((q[:, :, 1:] @ k[:, :, :2].swapaxes(2, 3)) / 2)
    second = out[:, :, queries == 1]
    right = both / both.sum(axis=3, keepdims=True) @ v[:, :, :2]
    np.testing.assert_allclose(second, right if second.size else second, rtol=1e-12)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", mpiattn.ALGORITHMS)
def test_owned_suits_every_algorithm(comm: Any, name: str) -> None:
    """The first program of docs/choosing.md."""
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text()
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 1001, 64)) for heads in (8, 2, 2))
    given = zip("qkv", (q, k, v) if comm.Get_rank() == 0 else (None, None, None), strict=True)
    scope: dict[str, Any] = {"mpiattn": mpiattn, "comm": comm, "name": name, **dict(given)}
    exec(program, scope)
    if comm.Get_rank() == 0:
        assert oracle.error(scope["whole"], oracle.attention(q, k, v, mpiattn.Causal())[0]) < 1e-12


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("mask", [mpiattn.Causal(), mpiattn.Full()], ids=str)
def test_whole_arrays_on_every_rank_are_a_longer_sequence(comm: Any, mask: mpiattn.Mask) -> None:
    tokens = 24
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, tokens, 4))
    right, _ = oracle.attention(q, k, v, mask)
    with mpiattn.RingAttention(comm, mask=mask) as attention:
        out, _ = attention.forward(q, k, v)
        assert out.shape == q.shape and k.shape[2] != len(attention.positions(tokens))  # by which it is noticed
        wrong = comm.allreduce(oracle.error(out, right))
        assert (wrong < 1e-12) if isinstance(mask, mpiattn.Full) else (wrong > 0.01)


@pytest.mark.mpi(min_size=2, max_size=4)
def test_heads_behind_tokens_are_taken_for_tokens(comm: Any) -> None:
    whole: Any
    tokens = 24
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, tokens, 8, 4))  # 24 tokens of 8 heads
    with mpiattn.RingAttention(comm, mask=mpiattn.Causal()) as attention:
        own = [mpiattn.scatter(x if comm.Get_rank() == 0 else None, comm, attention.layout) for x in (q, k, v)]
        out, _ = attention.forward(*own)
        assert own[1].shape[2] != len(attention.positions(tokens))  # by which it is noticed
        whole = mpiattn.gather(out, comm, attention.layout)
    if comm.Get_rank() == 0:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        right, _ = oracle.attention(q, k, v, mpiattn.Causal())
        assert oracle.error(whole.swapaxes(1, 2), right) > 0.01
