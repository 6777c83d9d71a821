"""Kernels in virtual time: they move the clock by the time that a block takes on the machine."""

from __future__ import annotations

import math
from typing import Any

from ..arrays import Array
from ..kernels.contract import Kernel, Progress
from ..kernels.sums import Sums
from ..machines.machine import operations
from ..problems.block import Block
from ..problems.dropout import Dropout
from .clock import current


class VirtualKernel(Sums):
    """The kernel for arrays without data: see `kernels.contract.Kernel`."""

    name = "virtual"

    def __init__(self) -> None:
        self.costs: dict[tuple[object, ...], tuple[float, float]] = {}

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Do nothing: the time that it takes isn't part of the machine description."""

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Spend the time of two matrix products; see `machine.operations`."""
        self._spend(q, v, block, False)

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array,
        d_q: Array, d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Spend the time of five."""
        self._spend(q, v, block, True)

    def _spend(self, q: Array, v: Array, block: Block, backward: bool) -> None:
        shapes = q.shape, v.shape, len(block.queries), backward
        cost = self.costs.get(shapes)
        if cost is None:
            cost = self.costs[shapes] = _cost(q, v, len(block.queries), backward)
        call, a_pair = cost
        current().compute(call + block.pairs * a_pair)


class ClockedKernel:
    """A kernel that computes, and then moves the virtual clock: for arrays with data on a virtual cluster."""

    def __init__(self, real: Kernel, clock: VirtualKernel) -> None:
        self.real, self.clock, self.name = real, clock, real.name
        self.drop, self.remember, self.begin = real.drop, real.remember, real.begin
        self.settle, self.complete = real.settle, real.complete

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, progress: Progress | None = None, **arrays: Any
    ) -> None:
        """Compute; messages need no progress meanwhile."""
        self.real.forward(q, k, v, block=block, **arrays)
        self.clock.forward(q, k, v, block=block, **arrays)

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, progress: Progress | None = None, **arrays: Any
    ) -> None:
        """Compute; messages need no progress meanwhile."""
        self.real.backward(q, k, v, block=block, **arrays)
        self.clock.backward(q, k, v, block=block, **arrays)


def _cost(q: Array, v: Array, queries: int, backward: bool) -> tuple[float, float]:
    """Return the seconds of a call, and of a pair, for a block of these sizes."""
    (batch, heads, _, dim), (_, _, keys, v_dim) = q.shape, v.shape
    work = operations(dim, v_dim, backward)
    rates = current().machine.rates(q.dtype.name)
    return rates.call, batch * heads * work / rates.at(math.sqrt(queries * keys), backward)
