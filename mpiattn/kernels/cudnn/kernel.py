"""Block attention on one rank by cuDNN.

cuDNN attends to rectangles: whole ones, or bounded by a diagonal on one side or both. A block is cut into
those. Each is one call, whose plan is built once, and one fused pass that merges what comes out. What cuDNN
can't do goes to the plain CuPy kernel, piece by piece.
"""

from __future__ import annotations

from typing import Any

from mpiattn.problems.dropout import Dropout
from mpiattn.problems.mask import Mask, Positions

from ..cupy.bounds import BoundsOf
from ..cupy.kernel import CupyKernel, Progress
from .calls import Call, Calls
from .pieces import Piece, pieces
from .waiting import WaitingSums, first_token

Array = Any

ALIGNMENT = 16  # bytes


class CudnnKernel(WaitingSums):
    """Attention of one rank's block by cuDNN. Parameters, arrays and results: as `NumpyKernel`'s.

    Work is queued on the current stream; nothing waits for the device. Partial results are rounded to the
    inputs' dtype before they are merged or added up in float32; those of sums that were begun (see `sums.py`)
    wait until there are some, or the sum settles. Backward, the order in which cuDNN adds up a row of d_q
    differs from run to run, and with it its last bits.
    """

    name = "cudnn"

    def __init__(self, mask: Mask, scale: float | None, dtype: Any) -> None:
        super().__init__(dtype)
        self.plain = CupyKernel(mask, scale)
        self.calls = Calls(scale, self, self.plain)
        self.prepared: dict[tuple[Any, ...], tuple[Positions, Positions, list[int], list[Call]]] = {}
        self.remembered: tuple[Array, Array] | None = None

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop nothing: `choose` gives problems with dropout to the plain kernel."""
        assert dropout is None

    def remember(self, row_delta: Array, out: Array) -> None:
        """Keep the output: backward, cuDNN takes it instead of row_delta."""
        self.remembered = row_delta, out

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        q_positions: Positions,
        k_positions: Positions,
        out: Array,
        lse: Array,
        progress: Progress | None = None,
    ) -> None:
        """Merge the attention of q to this block's keys into (out, lse), in place: see `NumpyKernel.forward`."""
        self._run(self.calls.forward, q_positions, k_positions, [q, k, v], [out, lse])
        if progress:
            progress()

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        d_out: Array,
        lse: Array,
        delta: Array,
        q_positions: Positions,
        k_positions: Positions,
        d_q: Array,
        d_k: Array,
        d_v: Array,
        progress: Progress | None = None,
    ) -> None:
        """Add this block's share of the gradients to d_q, d_k and d_v, in place: see `NumpyKernel.backward`."""
        others = [lse, delta, d_q, d_k, d_v]
        if self.remembered is not None:
            row_delta, out = self.remembered
            first = first_token(row_delta, delta)
            if first is not None and delta.shape[:2] == row_delta.shape[:2]:
                others.append(out[:, :, first : first + delta.shape[2]])
        self._run(self.calls.backward, q_positions, k_positions, [q, k, v, d_out], others)
        if progress:
            progress()

    def _run(
        self, prepare: Any, q_positions: Positions, k_positions: Positions, halves: list[Array], others: list[Array]
    ) -> None:
        """Queue the calls of a block; what depends on shapes and positions only is prepared once."""
        arrays = [*halves, *others]
        shapes = [(array.shape, array.strides, array.data.ptr % ALIGNMENT) for array in arrays]
        key = (prepare, id(q_positions), id(k_positions), arrays[0].dtype, *shapes)
        known = self.prepared.get(key)
        unreadable = [i for i, array in enumerate(arrays) if not _readable(array)] if known is None else known[2]
        for i in unreadable:
            arrays[i] = arrays[i].copy(order="C")
        if known is None:
            if len(self.prepared) >= BoundsOf.KEPT:
                self.prepared.clear()
            bounds = self.plain.bounds(q_positions, k_positions)
            parts = pieces(bounds.start, bounds.stop, q_positions, k_positions)
            if parts is None:
                whole = slice(0, len(q_positions)), slice(0, len(k_positions))
                calls = [self.calls.by_plain_kernel(Piece(*whole, False, None, q_positions, k_positions), len(arrays))]
            else:
                calls = [prepare(piece, *arrays) or self.calls.by_plain_kernel(piece, len(arrays)) for piece in parts]
            # With the positions, so that their numbers in the key are not given to other arrays.
            known = self.prepared[key] = q_positions, k_positions, unreadable, calls
        for call in known[3]:
            call(*arrays)


def _readable(array: Array) -> bool:
    """Return whether cuDNN can read an array in place, if it is to: it reads rows of the inputs' dtype."""
    if array.ndim != 4 or array.itemsize != 2:
        return True
    fits = array.strides[3] == array.itemsize and not any(stride % ALIGNMENT for stride in array.strides[:3])
    return fits and array.data.ptr % ALIGNMENT == 0
