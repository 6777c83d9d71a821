"""Masks: the interval of keys against the definition of each mask, pair by pair."""

import itertools
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpiattn import InputError
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


BEYOND = (sys.maxsize, sys.maxsize - 1, 2**63, 2**64, 10**30, 10**5000, math.inf, np.inf, 1e300, np.uint64(2**64 - 1))


@pytest.mark.parametrize("far", BEYOND, ids=range(len(BEYOND)))
def test_windows_of_any_size_are_unlimited(far: Any) -> None:
    every = np.arange(TOKENS)
    query, key = every[:, None], every
    for mask, expected in (
        (SlidingWindow(3, far), key >= query - 3),
        (SlidingWindow(far, 2), key <= query + 2),
        (SlidingWindow(far), key <= query),
        (SlidingWindow(far, far), key >= 0),
        (SlidingWindow(3, far) & SlidingWindow(far, 1), (key >= query - 3) & (key <= query + 1)),
        (Documents(LENGTHS) & SlidingWindow(far, far), DOCUMENT[query] == DOCUMENT[key]),
    ):
        assert np.array_equal(allowed(mask, every, every), np.broadcast_to(expected, (TOKENS, TOKENS)))
        assert counts(mask, [every], [every]) == np.broadcast_to(expected, (TOKENS, TOKENS)).sum()
        assert parse(str(mask)) == mask
    assert SlidingWindow(far).causal and SlidingWindow(3, 4).windowed
    if far >= sys.maxsize:  # it is a causal mask, in every way
        assert SlidingWindow(far) == SlidingWindow(math.inf) and not SlidingWindow(far).windowed


@pytest.mark.parametrize("reach", [0, 3, 2**40, 2**62, sys.maxsize, math.inf])
def test_positions_near_the_end_of_int64(reach: float) -> None:
    """In Python's integers, which have no end."""
    last = 2**63 - 2  # of all positions
    some: list[int] = [0, 1, 2**31, 2**62 - 1, 2**62, last - 4, last - 3, last - 1, last]
    positions, pairs_of_all = np.array(some), list(itertools.product(some, repeat=2))
    meanings: list[tuple[Mask, Callable[[int, int], bool]]] = [
        (Causal(), lambda q, k: k <= q),
        (SlidingWindow(reach), lambda q, k: q - reach <= k <= q),
        (SlidingWindow(1, reach), lambda q, k: q - 1 <= k <= q + reach),
        (SlidingWindow(reach, reach), lambda q, k: abs(q - k) <= reach),
    ]
    for mask, sees in meanings:
        expected = [sees(q, k) for q, k in pairs_of_all]
        assert allowed(mask, positions, positions).ravel().tolist() == expected
        assert pairs(mask, positions, positions) == sum(expected)
        lo, hi = mask.bounds(positions)
        assert (np.diff(lo) >= 0).all() and (np.diff(hi) >= 0).all() and (lo >= 0).all() and (hi >= 0).all()


@pytest.mark.parametrize("reach", [None, "3", -1, 3.5, math.nan, -math.inf, True, [3], np.arange(2), 1j])
def test_what_is_no_window(reach: Any) -> None:
    for arguments in ((reach,), (3, reach)):
        with pytest.raises(InputError, match=r"a window reaches 0 or more tokens .* or math\.inf for no limit, got"):
            SlidingWindow(*arguments)


@pytest.mark.parametrize("reach", [3, 3.0, np.int8(3), np.uint64(3), np.float32(3), np.array(3)])
def test_numbers_of_any_type_are_windows(reach: Any) -> None:
    assert SlidingWindow(reach) == SlidingWindow(3) and repr(SlidingWindow(reach)) == "SlidingWindow(left=3, right=0)"


@pytest.mark.parametrize(
    "lengths",
    [
        (n for n in (5, 7)), iter([5, 7]), map(int, "57"), [5.0, 7.0], np.array([5, 7], np.uint8), np.array([5.0, 7.0]),
        (np.int64(5), np.array(7)), {5: "a", 7: "b"}.keys(), range(5, 8, 2),
    ],
    ids=lambda lengths: type(lengths).__name__,
)  # fmt: skip
def test_lengths_of_any_kind(lengths: Any) -> None:
    mask = Documents(lengths)
    assert mask == Documents([5, 7]) and repr(mask) == "Documents(lengths=(5, 7))"
    for _ in range(2):  # a generator would be used up by now
        mask.check(12, 12)
        assert mask.bounds(np.array([4, 5]))[1].tolist() == [5, 12]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5.9, 7.9], "whole numbers, 0 or more, .* got 5.9"),
        (np.array([5, 6.5]), "whole numbers, .*6.5"),
        ([5, math.nan], "whole numbers"),
        ([math.inf], "whole numbers"),
        ([[5, 7]], re.escape("in one axis or iterable, got [5, 7]")),
        (np.array([[5], [7]]), re.escape("got array([5])")),
        ([True, False], "got True"),
        (np.array([True]), "got .*True"),
        ("57", "got '5'"),
        ([5, None], "got None"),
        ([5, -1], "0 or more, .* got -1"),
        (12, re.escape("takes the lengths of documents, such as [5, 7], got 12")),
        (None, "got None"),
        (np.array(12), r"got array\(12\)"),
    ],
)
def test_what_is_no_length(lengths: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Documents(lengths)


@pytest.mark.parametrize(
    ("lengths", "hint"),
    [
        ((0, 5, 12), "cumulative lengths; Documents takes the length of each, here 5, 7"),
        ((5, 12), "cumulative lengths; Documents takes the length of each, here 5, 7"),
        ((0, 0, 5, 5, 12), "here 0, 5, 0, 7"),
        (range(13), "here 1, 1, 1, 1, 1, 1, 1, 1, ..."),
        ((5, 6), "the documents hold 11 tokens, the sequence has 12$"),
        ((12, 5), "the documents hold 17 tokens, the sequence has 12$"),
        ((), "the documents hold 0 tokens, the sequence has 12$"),
        ((10**30,), "tokens, the sequence has 12$"),
    ],
)
def test_cumulative_lengths(lengths: Any, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        Documents(lengths).check(12, 12)


def test_documents_must_fill_the_sequence() -> None:
    with pytest.raises(ValueError, match="the documents hold 30 tokens, the sequence has 31"):
        Documents(LENGTHS).check(31, 31)
    with pytest.raises(ValueError, match="0 or more"):
        Documents([3, -1])
