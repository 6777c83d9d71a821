"""Block attention on one rank by a library that attends to rectangles: whole ones, or bounded by diagonals.

A block is cut into those. Each is one call, whose plan is built once, and one fused pass that merges what comes out.
What the library can't do goes to the plain CuPy kernel, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpiattn.problems.block import Block
from mpiattn.problems.dropout import Dropout

from ..contract import Progress, rows_of
from ..cupy.bounds import BoundsOf
from ..cupy.kernel import CupyKernel
from .calls import Build, Call, Calls
from .cut import SQUARE, Piece, pieces
from .waiting import WaitingSums, first_token

Array = Any

ALIGNMENT = 16  # bytes


class PieceKernel:
    """Attention of one rank's block, piece by piece.

    Work is queued on the current stream; nothing waits for the device. Partial results are rounded to the
    inputs' dtype before they are merged or added up in float32; those of sums that were begun (see `sums.py`)
    wait until there are some, or the sum settles. Scores and lse are float32, also backward, where those
    above some hundreds give probabilities that are off by as much as they are rounded.

    Parameters
    ----------
    name : str
        Of the library.
    build : callable
        Its plan for a piece of some shapes; see `calls.Build`.
    scale, rounds
        As `choose`'s.
    dtype : numpy dtype
        Of the inputs.
    square : int, optional
        Keys before a diagonal from which on the library is faster at a rectangle and a square; None: never.
    """

    def __init__(
        self, name: str, build: Build, scale: float | None, dtype: np.dtype[np.generic], rounds: bool = True,
        square: int | None = SQUARE,
    ) -> None:  # fmt: skip
        self.name, self.square = name, square
        self.sums, self.plain = WaitingSums(dtype, rounds), CupyKernel(scale)
        self.begin, self.settle, self.complete = self.sums.begin, self.sums.settle, self.sums.complete
        self.calls = Calls(build, scale, self.sums, self.plain)
        self.prepared: dict[tuple[Any, ...], tuple[list[int], list[Call]]] = {}
        self.remembered: tuple[Array, Array] | None = None
        self.without_plan = False
        """Whether there was a piece that the library can't do."""

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop nothing: `choose` gives problems with dropout to the plain kernel."""
        assert dropout is None

    def remember(self, delta: Array, out: Array) -> None:
        """Keep the output: backward, the library takes it instead of delta."""
        self.remembered = delta, out

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Merge the attention of the block's queries to its keys into (out, lse), in place; see `contract.Kernel`."""
        q, out, lse = rows_of(block, q, out, lse)
        self._run(self.calls.forward, block, [q, k, v, out, lse])
        if progress:
            progress()

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Add this block's share of the gradients to d_q, d_k and d_v, in place; see `contract.Kernel`."""
        q, d_out, lse, delta, d_q = rows_of(block, q, d_out, lse, delta, d_q)
        arrays = [q, k, v, d_out, lse, delta, d_q, d_k, d_v]
        if self.remembered is not None:
            whole, out = self.remembered
            first = first_token(whole, delta)
            if first is not None and delta.shape[:2] == whole.shape[:2]:
                arrays.append(out[:, :, first : first + delta.shape[2]])
        self._run(self.calls.backward, block, arrays)
        if progress:
            progress()

    def _run(self, prepare: Callable[..., Call | None], block: Block, arrays: list[Array]) -> None:
        """Queue the calls of a block; what depends on the block and on shapes only is prepared once."""
        shapes = [(array.shape, array.strides, array.data.ptr % ALIGNMENT) for array in arrays]
        key = (prepare, block, arrays[0].dtype, *shapes)
        known = self.prepared.get(key)
        unreadable = [i for i, array in enumerate(arrays) if not _readable(array)] if known is None else known[0]
        for i in unreadable:
            arrays[i] = arrays[i].copy(order="C")
        if known is None:
            if len(self.prepared) >= BoundsOf.KEPT:
                self.prepared.clear()
            bounds = self.plain.bounds(block)
            parts = pieces(bounds.start, bounds.stop, block, self.square)
            if parts is None:
                whole = Piece.whole(block)
                calls = [self.calls.by_plain_kernel(whole, *arrays)]
            else:
                plans = [prepare(piece, *arrays) for piece in parts]
                self.without_plan |= None in plans
                pairs = zip(plans, parts, strict=True)
                calls = [plan or self.calls.by_plain_kernel(piece, *arrays) for plan, piece in pairs]
            known = self.prepared[key] = unreadable, calls
        for call in known[1]:
            call(*arrays)


def _readable(array: Array) -> bool:
    """Return whether the library can read an array in place, if it is to: it reads rows of the inputs' dtype."""
    if array.ndim != 4 or array.itemsize != 2:
        return True
    fits = array.strides[3] == array.itemsize and not any(stride % ALIGNMENT for stride in array.strides[:3])
    return fits and array.data.ptr % ALIGNMENT == 0
