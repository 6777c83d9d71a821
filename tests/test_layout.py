"""Layouts: every token has one owner; scatter and gather are inverses; wrong shares are refused everywhere."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpiattn import Causal, gather, scatter
from mpiattn.errors import InputError
from mpiattn.problems.layout import LAYOUTS, default, positions
from mpiattn.problems.mask import parse
from mpiattn.problems.pairs import pairs
from mpiattn.problems.problem import GRAIN, Problem


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 200), st.integers(1, 20))
def test_each_token_has_one_owner(layout: str, tokens: int, ranks: int) -> None:
    owned = [positions(layout, tokens, ranks, rank) for rank in range(ranks)]
    assert np.array_equal(np.sort(np.concatenate(owned)), np.arange(tokens))
    for chunk in owned:
        assert chunk.dtype == np.int64 and np.all(np.diff(chunk) > 0)
        assert tokens // ranks - 1 <= len(chunk) <= -(-tokens // ranks) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_tokens_of_any_type(layout: str) -> None:
    """NumPy's small integers would overflow in the products that cut the sequence."""
    for tokens in (np.uint8(200), np.int16(200), np.array(200)):
        for rank in range(7):
            assert np.array_equal(positions(layout, tokens, 7, rank), positions(layout, 200, 7, rank))
    for wrong in (-1, 2.0, "2", None, True):
        with pytest.raises(InputError, match="tokens are a whole number, 0 or more, got"):
            positions(layout, wrong, 7, 0)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zigzag_balances_a_causal_mask(ranks: int) -> None:
    tokens = 2 * ranks * 10
    whole = np.arange(tokens)
    work = {name: [pairs(Causal(), positions(name, tokens, ranks, r), whole) for r in range(ranks)] for name in LAYOUTS}
    assert len(set(work["zigzag"])) == 1
    assert max(work["contiguous"]) > 1.4 * min(work["contiguous"])


def test_default_is_zigzag_where_that_balances() -> None:
    found = {mask: default(parse(mask)) for mask in ("full", "causal", "window=8", "causal+window=8", "window=8,8")}
    assert [mask for mask, layout in found.items() if layout == "zigzag"] == ["causal"]
    assert set(found.values()) == {"zigzag", "contiguous"}
    assert default(parse("documents=5,7+causal")) == "zigzag"


def test_unknown_layout_names_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown layout 'spiral': choose from contiguous, zigzag, striped"):
        positions("spiral", 10, 2, 0)


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize("tokens", [0, 2, 101])
def test_scatter_and_gather_are_inverses(comm: Any, layout: str, dtype: type, tokens: int) -> None:
    root = comm.Get_size() - 1
    whole: Any = np.arange(2 * 3 * tokens * 5).reshape(2, 3, tokens, 5).astype(dtype)
    share = scatter(whole if comm.Get_rank() == root else None, comm, layout, root)
    assert np.array_equal(share, whole[:, :, positions(layout, tokens, comm.Get_size(), comm.Get_rank())])
    back = gather(share, comm, layout, root)
    assert (back is not None) == (comm.Get_rank() == root)
    assert back is None or (np.array_equal(back, whole) and back.dtype == whole.dtype)


@pytest.mark.mpi
def test_another_axis(comm: Any) -> None:
    tokens = np.arange(23, dtype=np.int32)[None]
    share = scatter(tokens if comm.Get_rank() == 0 else None, comm, "zigzag", axis=1)
    back = gather(share, comm, "zigzag", axis=1)
    assert back is None or np.array_equal(back, tokens)


@pytest.mark.mpi
def test_scatter_of_nothing_is_refused_on_all_ranks(comm: Any) -> None:
    with pytest.raises(InputError, match="rank 0 must give an array with an axis 2"):
        scatter(None, comm, "zigzag")
    with pytest.raises(InputError, match="unknown layout"):
        scatter(np.zeros((1, 1, 4, 1)), comm, "spiral")


@pytest.mark.mpi(min_size=2)
def test_gather_of_wrong_shares_is_refused_on_all_ranks(comm: Any) -> None:
    tokens = 4 if comm.Get_rank() else 9
    with pytest.raises(InputError, match=r"rank . has float64 .1, 2, ., 3.; its share of"):
        gather(np.zeros((1, 2, tokens, 3)), comm, "contiguous")
    with pytest.raises(InputError, match="rank 1 must give an array"):
        gather(np.zeros((1, 2, 4, 3)) if comm.Get_rank() != 1 else [1, 2], comm, "contiguous")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mask", ["full", "causal", "window=40", "documents=100,0,300,2600+causal"])
@pytest.mark.parametrize("tokens", [0, 1, 37, 3000])
def test_halves_of_an_own_block(name: str, mask: str, tokens: int) -> None:
    if mask.startswith("documents") and tokens != 3000:
        pytest.skip("of another length")
    problem = Problem(3, 1, 2, 2, 8, 8, tokens, tokens, np.dtype(np.float32), name, parse(mask))
    for rank, (queries, keys) in enumerate(zip(problem.q_positions, problem.kv_positions, strict=True)):
        halves = problem.halves(rank)
        assert np.array_equal(np.concatenate([queries[rows] for rows in halves]), queries)
        early, late = (pairs(problem.mask, queries[rows], keys) for rows in halves)
        assert abs(early - late) <= 2 * (GRAIN + 1) * len(keys)
        if tokens == 3000 and mask in ("full", "causal"):
            assert 0.6 < early / late < 1.1
