"""A kernel that keeps a record of each block of compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays import Array
from ..kernels.contract import Kernel
from ..messages import message
from ..problems.block import Block
from .events import Event, Trace


class TracedKernel:
    """A kernel that records each block it computes; what it does with sums is the kernel's own."""

    def __init__(self, kernel: Kernel, trace: Trace) -> None:
        self.kernel, self.trace, self.name = kernel, trace, kernel.name
        self.drop, self.remember, self.begin = kernel.drop, kernel.remember, kernel.begin
        self.settle, self.complete = kernel.settle, kernel.complete

    def forward(self, q: Array, k: Array, v: Array, *, block: Block, **arrays: Any) -> None:
        """Compute a block forward, and record it."""
        self._record("forward", self.kernel.forward, q, k, v, block, arrays)

    def backward(self, q: Array, k: Array, v: Array, *, block: Block, **arrays: Any) -> None:
        """Compute a block backward, and record it."""
        self._record("backward", self.kernel.backward, q, k, v, block, arrays)

    def _record(
        self, name: str, compute: Callable[..., None], q: Array, k: Array, v: Array, block: Block,
        arrays: dict[str, Any],
    ) -> None:  # fmt: skip
        first, second = (int(positions[0]) if len(positions) else -1 for positions in (block.queries, block.keys))
        event = Event("compute", name, -1, 0, message.clock(), block=(first, second))
        event.sizes = len(block.queries), len(block.keys)
        self.trace.events.append(event)
        compute(q, k, v, block=block, **arrays)
        event.end = message.clock()
