"""Steps of a schedule, and the time that it takes.

In a rank's own coordinates Q slot j is the Q chunk that has travelled j hops along the grid row, and KV slot
i the K/V chunk that has travelled i hops along the grid column; slot 0 is its own. The tile is all blocks
(i, j). Every rank does the same step at the same time, so one list serves them all.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..arrays.softmax import LSE


class Op(str, enum.Enum):
    """Contents of one hop's message; a backward Q brings dO, delta and LSE."""

    Q = "Q"
    KV = "KV"
    O = "O"
    DQ = "dQ"
    DKV = "dKV"


@dataclass(frozen=True)
class Step:
    """At most one message, and the blocks (KV slot, Q slot) computed while it travels.

    `hop` counts the messages of one kind from 1. A Q or KV hop receives that slot and forwards the one before;
    an O, dQ or dKV hop sends that slot's partial sum and receives the next slot's, after the last slot 0's.
    """

    message: Op | None
    hop: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HopTimes:
    """Time of one block and of one hop of each kind, in any one unit."""

    q: float
    kv: float
    block: float
    o: float = 0.0  # forward only
    dq: float = 0.0  # backward only
    dkv: float = 0.0  # backward only

    def __post_init__(self) -> None:
        for name, time in vars(self).items():
            if not (math.isfinite(time) and time >= 0):
                raise ValueError(f"the cost of {name} is a finite number, 0 or more, not {time}")

    def of(self, op: Op | None) -> float:
        """Time of one hop."""
        return {None: 0.0, Op.Q: self.q, Op.KV: self.kv, Op.O: self.o, Op.DQ: self.dq, Op.DKV: self.dkv}[op]

    def communication(self, rows: int, cols: int) -> float:
        """Time of all hops of a tile."""
        return (cols - 1) * (self.q + self.o + self.dq) + (rows - 1) * (self.kv + self.dkv)

    def balanced(self, rows: int, cols: int, ratio: float = 1.0) -> HopTimes:
        """Return the same hops, with blocks such that all hops take `ratio` times as long as all blocks."""
        return replace(self, block=(self.communication(rows, cols) or 1.0) / (ratio * rows * cols))


def relative(
    *,
    backward: bool = False,
    heads: int = 1,
    kv_heads: int = 1,
    itemsize: int = 4,
    partial_itemsize: int = 4,
    head_dim: int | None = None,
    block: float = 1.0,
) -> HopTimes:
    """Hops by their bytes, in chunks of Q. With `head_dim`, rows of LSE and delta count too."""
    kv, partial = 2 * kv_heads / heads, partial_itemsize / itemsize
    delta, lse = (size / itemsize / head_dim if head_dim else 0.0 for size in (partial_itemsize, LSE.itemsize))
    if backward:
        return HopTimes(q=2 + delta + lse, kv=kv, dq=partial, dkv=kv * partial, block=block)
    return HopTimes(q=1.0, kv=kv, o=partial + lse, block=block)


def makespan(steps: Sequence[Step], costs: HopTimes) -> float:
    """Time of a schedule; a step ends when both its message and its blocks have."""
    return math.fsum(max(costs.of(step.message), len(step.blocks) * costs.block) for step in steps)
