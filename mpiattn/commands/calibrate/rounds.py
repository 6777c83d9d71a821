"""The time of some work that all ranks do at once, in several rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import ModuleType

import numpy as np

from ...messages.message import Communicator
from ..timing import timed

ENOUGH = 0.01
"""Seconds that calls on a GPU fill: the first ones wait for nothing, and the end of the last is waited for."""


def median(comm: Communicator, rounds: int, work: Callable[[], object], xp: ModuleType) -> float:
    """Return the median over rounds, after two that don't count, of the seconds of a call on the slowest rank."""
    timed(comm, work, 1, xp)
    once = timed(comm, work, 1, xp)
    calls = 1 if xp is np else int(ENOUGH / once) + 1
    return statistics.median(timed(comm, work, calls, xp) for _ in range(rounds))
