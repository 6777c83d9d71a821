"""A kernel that keeps a record of each block of compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..arrays import Array
from ..kernels.contract import Kernel, Progress
from ..messages import message
from ..problems.block import Block
from .events import Event, Trace


class TracedKernel:
    """A kernel that records each block it computes; what it does with sums is the kernel's own."""

    def __init__(self, kernel: Kernel, trace: Trace) -> None:
        self.kernel, self.trace, self.name = kernel, trace, kernel.name
        self.drop, self.remember, self.begin = kernel.drop, kernel.remember, kernel.begin
        self.settle, self.complete = kernel.settle, kernel.complete

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Compute a block forward, and record it."""
        with self._recorded("forward", block):
            self.kernel.forward(q, k, v, block=block, out=out, lse=lse, progress=progress)

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Compute a block backward, and record it."""
        with self._recorded("backward", block):
            self.kernel.backward(
                q, k, v, block=block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v, progress=progress
            )

    @contextmanager
    def _recorded(self, name: str, block: Block) -> Iterator[None]:
        first, second = (int(positions[0]) if len(positions) else -1 for positions in (block.queries, block.keys))
        event = Event("compute", name, -1, 0, message.clock(), block=(first, second))
        event.sizes = len(block.queries), len(block.keys)
        self.trace.events.append(event)
        yield
        event.end = message.clock()
