"""Ranks that are alike, and how to name them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def group(ranks: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[tuple[object, ...], list[int]]]:
    """Return the ranks (their numbers) that have the same values under these names."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for one in ranks:
        groups.setdefault(tuple(one[name] for name in names), []).append(one["rank"])
    return list(groups.items())


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers in order as "0-3, 6"."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        runs.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return ", ".join(runs)
