"""The kernel for arrays without data: it moves the clock by the time that the block takes on the machine."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.sums import Sums
from ..machines.machine import operations
from ..problems.mask import Mask, Positions
from ..problems.pairs import pairs
from ..problems.problem import Problem
from . import current


class VirtualKernel(Sums):
    """Attention of one rank's block in virtual time; parameters and methods as those of `NumpyKernel`."""

    def __init__(self, mask: Mask, scale: float | None = None, problem: Problem | None = None) -> None:
        self.mask = mask
        self.problem = problem  # keeps the positions alive, and with them the meaning of their ids
        self.costs: dict[tuple[object, ...], tuple[float, float]] = {}
        self.queries, self.keys, self.counts = _blocks(problem) if problem else ({}, {}, np.empty((0, 0), np.int64))

    def drop(self, dropout: Any, first_head: int = 0) -> None:
        """Do nothing: the time that it takes isn't part of the machine description."""

    def forward(self, q: Any, k: Any, v: Any, q_positions: Positions, k_positions: Positions, *rest: Any) -> None:
        """Spend the time of two matrix products; see `machine.operations`."""
        self._spend(q, v, q_positions, k_positions, False)

    def backward(
        self, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, q_positions: Positions, k_positions: Positions,
        *rest: Any,
    ) -> None:  # fmt: skip
        """Spend the time of five."""
        self._spend(q, v, q_positions, k_positions, True)

    def _spend(self, q: Any, v: Any, q_positions: Positions, k_positions: Positions, backward: bool) -> None:
        i, j = self.queries.get(id(q_positions)), self.keys.get(id(k_positions))
        # A chunk of two ranks' tokens, or a part of one's, is none of the problem's.
        count = self._count(q_positions, k_positions) if i is None or j is None else self.counts.item(i, j)
        shapes = q.shape, v.shape, backward
        cost = self.costs.get(shapes)
        if cost is None:
            cost = self.costs[shapes] = self._cost(q, v, backward)
        call, a_pair = cost
        current().compute(call + count * a_pair)

    def _count(self, q_positions: Positions, k_positions: Positions) -> int:
        key = id(q_positions), id(k_positions), self.mask
        if key not in _COUNTS:
            _COUNTS[key] = q_positions, k_positions, pairs(self.mask, q_positions, k_positions)
            if len(_COUNTS) > 2**14:
                del _COUNTS[next(iter(_COUNTS))]
        return _COUNTS[key][2]

    def _cost(self, q: Any, v: Any, backward: bool) -> tuple[float, float]:
        """Return the seconds of a call, and of a pair, for a block of these sizes."""
        (batch, heads, queries, dim), (_, _, keys, v_dim) = q.shape, v.shape
        work = operations(dim, v_dim, backward)
        rates = current().machine.rates(q.dtype.name)
        return rates.call, batch * heads * work / rates.at(math.sqrt(queries * keys), backward)


class ClockedKernel:
    """A kernel that computes, and then moves the virtual clock: for arrays with data on a virtual cluster."""

    def __init__(self, real: Any, clock: VirtualKernel) -> None:
        self.real, self.clock = real, clock

    def forward(self, *arguments: Any) -> None:
        """Compute; messages need no progress meanwhile."""
        self.real.forward(*(None if callable(argument) else argument for argument in arguments))
        self.clock.forward(*arguments)

    def backward(self, *arguments: Any) -> None:
        """Compute; messages need no progress meanwhile."""
        self.real.backward(*(None if callable(argument) else argument for argument in arguments))
        self.clock.backward(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_COUNTS: dict[tuple[int, int, Mask], tuple[Positions, Positions, int]] = {}
"""Pairs of blocks that are no problem's, by the identity of their positions, which are kept."""


@functools.lru_cache(maxsize=4)
def _blocks(problem: Problem) -> tuple[dict[int, int], dict[int, int], NDArray[np.int64]]:
    """Return the chunks' numbers by the identity of their positions, and how many pairs each block has."""
    places = [{id(chunk): rank for rank, chunk in enumerate(p)} for p in (problem.q_positions, problem.kv_positions)]
    return places[0], places[1], problem.pairs
