"""Calls that compute a piece of a block: prepared for arrays of some shapes, then called with any such arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cupy

from mpiattn.arrays.cupy.passes import RowPass
from mpiattn.arrays.cupy.place import Place
from mpiattn.arrays.softmax import LSE

from ..cupy.kernel import CupyKernel
from .cut import Piece
from .scratch import Scratch
from .waiting import WaitingSums

Array = Any
Call = Callable[..., None]

Plan = Callable[..., None]
"""The attention of one shape: called with a Scratch and pointers, it queues the work on the current stream.

Forward the pointers of q, k, v, out, lse; backward those of q, k, v, out, d_out, lse, d_q, d_k, d_v. What it writes
lies without gaps, as does lse, which is float32.
"""

Build = Callable[..., "Plan | None"]
"""A function of a library that builds a plan: for a device, a dtype's name, a scale, a piece's `causal` and `left`.

Then the Places of q, k, v forward, of q, k, v, d_out, out backward. None where the library has no such plan.
"""

FORWARD = 5  # arrays of a call forward: q, k, v, out, lse


class Calls:
    """Prepares calls of a library, each with the pass that adds up what comes out, or of the plain kernel."""

    def __init__(self, build: Build, scale: float | None, sums: WaitingSums, plain: CupyKernel) -> None:
        self.build, self.scale, self.sums, self.plain = build, scale, sums, plain
        self.scratch = Scratch()

    def forward(self, piece: Piece, *arrays: Array) -> Call | None:
        """Return what computes a piece forward, on arrays of these shapes; None where there is no plan."""
        views = _part(piece, arrays)
        plan = self._plan(piece, arrays[0], *map(Place.of, views[:3]))
        if plan is None:
            return None
        q, _, v, out, lse = views
        rows, dtype, first = q.shape[:3], q.dtype, piece.queries.start
        shape, offsets = (*rows, v.shape[3]), _offsets(views, arrays)
        new = Place.packed(shape, dtype), Place.packed(rows, lse.dtype)
        merge = RowPass("merge", out.dtype, dtype, Place.of(out), Place.of(lse), *new)

        def call(*arrays: Array) -> None:
            q, k, v, out, lse = (array.data.ptr + offset for array, offset in zip(arrays, offsets, strict=True))
            part, part_lse = cupy.empty(shape, dtype), cupy.empty(rows, cupy.float32)
            plan(self.scratch, q, k, v, part.data.ptr, part_lse.data.ptr)
            if not self.sums.wait(arrays[3], part, first, part_lse):
                part_lse = part_lse.astype(LSE)
                merge(out, lse, part.data.ptr, part_lse.data.ptr)

        return call

    def backward(self, piece: Piece, *arrays: Array) -> Call | None:
        """Return what computes a piece backward, on arrays of these shapes; None where there is no plan."""
        views = _part(piece, arrays)
        q, k, v, d_out, lse, delta, d_q, d_k, d_v, *known = views
        rows, dtype = q.shape[:3], q.dtype
        near = Place.packed(d_out.shape, dtype), Place.packed(rows, cupy.float32)
        plan = self._plan(piece, q, *map(Place.of, (q, k, v, d_out)), Place.of(known[0]) if known else near[0])
        if plan is None:
            return None
        shapes = [array.shape for array in (q, k, v)]
        stand_in = RowPass("stand_in", delta.dtype, dtype, *near, *map(Place.of, (d_out, lse, delta)))
        adds = [
            RowPass("accumulate", delta.dtype, dtype, Place.of(total), Place.packed(shape, dtype))
            for total, shape in zip((d_q, d_k, d_v), shapes, strict=True)
        ]
        sizes = [math.prod(place.shape) * place.itemsize for place in near]
        offsets = _offsets(views, arrays)
        firsts = piece.queries.start, piece.keys.start, piece.keys.start

        def call(*arrays: Array) -> None:
            pointers = [array.data.ptr + offset for array, offset in zip(arrays, offsets, strict=True)]
            (q, k, v, d_out, lse, delta), totals = pointers[:6], pointers[6:9]
            shares = [cupy.empty(shape, dtype) for shape in shapes]
            if len(pointers) > 9:
                out, near_lse = pointers[9], self.scratch.rounded(arrays[4][:, :, piece.queries])
            else:
                out, near_lse = self.scratch.buffers(sizes)
                stand_in(out, near_lse, d_out, lse, delta)
            plan(self.scratch, q, k, v, out, d_out, near_lse, *(share.data.ptr for share in shares))
            for add, array, total, share, first in zip(adds, arrays[6:9], totals, shares, firsts, strict=True):
                if not self.sums.wait(array, share, first):
                    add(total, share.data.ptr)

        return call

    def by_plain_kernel(self, piece: Piece, *arrays: Array) -> Call:
        """Return what computes a piece with the plain kernel, forward or backward as these arrays are."""

        def forward(*arrays: Array) -> None:
            self.sums.write(*arrays)  # the plain kernel adds at once
            q, k, v, out, lse = _part(piece, arrays)
            self.plain.forward(q, k, v, block=piece.block, out=out, lse=lse)

        def backward(*arrays: Array) -> None:
            self.sums.write(*arrays)
            q, k, v, d_out, lse, delta, d_q, d_k, d_v, *_ = _part(piece, arrays)
            self.plain.backward(
                q, k, v, block=piece.block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )

        return forward if len(arrays) == FORWARD else backward

    def _plan(self, piece: Piece, q: Array, *places: Place) -> Plan | None:
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        return self.build(cupy.cuda.Device().id, q.dtype.name, float(scale), piece.causal, piece.left, *places)


def _part(piece: Piece, arrays: Sequence[Array]) -> list[Array]:
    """Return a piece of a block's arrays: forward q, k, v, out, lse; backward q, k, v, ..., d_q, d_k, d_v."""
    of_keys = (1, 2) if len(arrays) == FORWARD else (1, 2, 7, 8)
    return [array[:, :, piece.keys if i in of_keys else piece.queries] for i, array in enumerate(arrays)]


def _offsets(views: Sequence[Array], arrays: Sequence[Array]) -> list[int]:
    return [view.data.ptr - array.data.ptr for view, array in zip(views, arrays, strict=True)]
