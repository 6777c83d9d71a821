"""Who has which heads and tokens: of ranks that share out heads, of those that share a chunk, of grids of both."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mpiattn.algorithms import hybrid
from mpiattn.problems import layout

HEADS = [(4, 4), (8, 2), (6, 1), (3, 3), (5, 1), (6, 3), (12, 4), (1, 1)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("ranks", range(1, 10))
def test_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Each query head is on one rank; a rank has the K/V heads that its query heads use, and no others."""
    group = heads // kv_heads
    shares = [layout.heads(heads, kv_heads, ranks, rank) for rank in range(ranks)]
    assert [head for own, _ in shares for head in range(heads)[own]] == list(range(heads))
    for own, own_kv in shares:
        assert sorted({head // group for head in range(heads)[own]}) == list(range(kv_heads)[own_kv])
        if own_kv.stop > own_kv.start:  # so that local query head h uses local K/V head h // (heads / kv_heads)
            size, rest = divmod(own.stop - own.start, own_kv.stop - own_kv.start)
            assert rest == 0 and (own_kv.stop - own_kv.start == 1 or size == group)
    counts = [own.stop - own.start for own, _ in shares]
    if kv_heads % ranks == 0 or (ranks % kv_heads == 0 and group % (ranks // kv_heads) == 0):
        assert len(set(counts)) == 1
    if group == 1:
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 101])
@pytest.mark.parametrize(("chunks", "parts"), [(1, 3), (2, 2), (3, 2), (2, 1)])
def test_shared_chunks(name: str, tokens: int, chunks: int, parts: int) -> None:
    """The ranks that share a chunk have its tokens in order, as many each as can be."""
    for chunk in range(chunks):
        runs = [layout.positions(f"{name}/{parts}", tokens, chunks * parts, chunk * parts + p) for p in range(parts)]
        assert np.array_equal(np.concatenate(runs), layout.positions(name, tokens, chunks, chunk))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize("wrong", ["zigzag/3", "zigzag/0", "zigzag/x", "zigzag/-2", "/2", "everywhere", "zigzag/2/2"])
def test_unknown_layouts(wrong: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        layout.check(wrong, 4)


@pytest.mark.parametrize("ranks", range(1, 13))
def test_completed_grids(ranks: int) -> None:
    assert hybrid.shape(ranks, None, None, None) in hybrid.shapes(ranks)
    for ulysses, rows, cols in hybrid.shapes(ranks):
        for given in product((True, False), repeat=3):
            asked = [size if use else None for size, use in zip((ulysses, rows, cols), given, strict=True)]
            result = hybrid.shape(ranks, *asked)
            assert result in hybrid.shapes(ranks)
            assert all(a in (None, b) for a, b in zip(asked, result, strict=True))
