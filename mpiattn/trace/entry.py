"""The entries of a trace's file, checked: it may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .events import Event

MOST_RANKS = 4096
"""More than any trace has: tables of rank by rank are made of it."""

LONGEST = 1e16
"""Microseconds, three centuries: what is beyond is no time."""


def ranks_of(content: Any) -> int:
    """Return how many ranks a document has; each has an entry with its name."""
    ranks = content["otherData"]["ranks"]
    if type(ranks) is not int or not 0 <= ranks <= min(MOST_RANKS, len(content["traceEvents"])):
        raise ValueError(f"{ranks!r} is no number of ranks")
    return ranks


def event_of(entry: Mapping[str, Any], ranks: int) -> tuple[int, Event]:
    """Return the rank and the event of an entry, or raise an error where they can't be so."""
    rank, more = whole(entry["pid"], 0, ranks - 1), entry["args"]
    start, duration = time(entry["ts"]), time(entry["dur"])
    peer, nbytes = whole(more.get("peer", -1), -1, ranks - 1), whole(more.get("bytes", 0), 0, 2**62)
    block, owners = (pair(more[key]) if key in more else None for key in ("block", "owners"))
    if not isinstance(entry["cat"], str) or not isinstance(more["name"], str) or duration < 0:
        raise ValueError(f"no event: {str(entry)[:200]}")
    end = math.nan if "end" in more else (start + duration) / 1e6
    return rank, Event(entry["cat"], more["name"], peer, nbytes, start / 1e6, end, block, owners=owners)


def pair(values: Iterable[object]) -> tuple[int, int]:
    """Return two whole numbers, or raise an error."""
    first, second = (whole(value, -1, 2**62) for value in values)
    return first, second


def whole(value: object, least: int, most: int) -> int:
    """Return a whole number between two others, or raise ValueError."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no whole number from {least} to {most}")
    return value


def time(value: Any) -> float:
    """Return a time in microseconds, or raise ValueError."""
    if type(value) not in (int, float) or not -LONGEST < value < LONGEST:
        raise ValueError(f"{str(value)[:40]} is no time")
    return float(value)
