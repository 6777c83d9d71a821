"""Masks: the interval of keys against the definition of each mask, pair by pair."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpiattn.problems.layout import LAYOUTS
from mpiattn.problems.layout import positions as owned
from mpiattn.problems.mask import Causal, Documents, Full, Mask, Positions, SlidingWindow, allowed, parse
from mpiattn.problems.pairs import counts, pairs

LENGTHS = (7, 0, 20, 3)
TOKENS = sum(LENGTHS)
DOCUMENT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)

DEFINITIONS = [
    (Full(), lambda q, k: True),
    (Causal(), lambda q, k: k <= q),
    (SlidingWindow(4), lambda q, k: q - 4 <= k <= q),
    (SlidingWindow(3, 5), lambda q, k: q - 3 <= k <= q + 5),
    (Documents(LENGTHS), lambda q, k: DOCUMENT[q] == DOCUMENT[k]),
    (Documents(LENGTHS) & Causal(), lambda q, k: DOCUMENT[q] == DOCUMENT[k] and k <= q),
    (Documents(LENGTHS) & SlidingWindow(2, 1), lambda q, k: DOCUMENT[q] == DOCUMENT[k] and q - 2 <= k <= q + 1),
]


@pytest.mark.parametrize(("mask", "definition"), DEFINITIONS, ids=[str(mask) for mask, _ in DEFINITIONS])
def test_masks_mean_what_they_say(mask: Mask, definition: Callable[[int, int], bool]) -> None:
    every = np.arange(TOKENS)
    expected = np.array([[bool(definition(int(q), int(k))) for k in every] for q in every])
    assert np.array_equal(allowed(mask, every, every), expected)
    assert parse(str(mask)) == mask


positions = st.sets(st.integers(0, TOKENS - 1)).map(lambda chosen: np.array(sorted(chosen), dtype=np.int64))


@given(st.sampled_from([mask for mask, _ in DEFINITIONS]), positions, positions, positions)
def test_pairs_are_counted(mask: Mask, queries: Positions, keys: Positions, others: Positions) -> None:
    assert pairs(mask, queries, keys) == allowed(mask, queries, keys).sum()
    table = counts(mask, [queries, others], [keys, others, queries])
    assert np.array_equal(table, [[pairs(mask, q, k) for k in (keys, others, queries)] for q in (queries, others)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "mask", [mask for mask, _ in DEFINITIONS[:4]] + [Documents([7, 0, 40, 3, 60]) & Causal()], ids=str
)
@pytest.mark.parametrize(("queries", "keys"), [(110, 110), (5, 90), (37, 0), (1, 1)])
def test_pairs_of_the_layouts_blocks(layout: str, mask: Mask, queries: int, keys: int) -> None:
    """Of long runs of positions, and of single ones."""
    q = [owned(layout, queries, 4, rank) for rank in range(4)]
    k = [owned(layout, keys, 7, rank) for rank in range(7)]
    assert counts(mask, q, k).tolist() == [[pairs(mask, one, other) for other in k] for one in q]


def test_which_masks_are_causal() -> None:
    assert Causal().causal and SlidingWindow(3).causal and (Documents([4, 4]) & Causal()).causal
    assert not Full().causal and not SlidingWindow(3, 1).causal
    assert not Documents([1, 1, 5]).causal and (Documents([1]) & Causal()).causal


@pytest.mark.parametrize("text", ["", "casual", "window", "window=1,2,3", "window=-1", "documents=a"])
def test_unknown_masks_name_the_choices(text: str) -> None:
    with pytest.raises(ValueError, match="choose from full, causal, window=LEFT"):
        parse(text)


def test_documents_must_fill_the_sequence() -> None:
    with pytest.raises(ValueError, match="the documents hold 30 tokens, the sequence has 31"):
        Documents(LENGTHS).check(31, 31)
    with pytest.raises(ValueError, match="0 or more"):
        Documents([3, -1])
