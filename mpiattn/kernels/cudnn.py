"""Block attention on one rank by cuDNN, through NVIDIA's Python frontend, on CuPy arrays.

cuDNN attends to rectangles: whole ones, or bounded by a diagonal on one side or both. A block is cut into
those; blocks of the zigzag and striped layouts under a causal mask, and those of sliding windows, take one
or two. Each is one call, whose plan is built once, and one fused pass that merges what comes out. What cuDNN
can't do goes to the plain CuPy kernel, piece by piece.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from mpiattn.arrays import Parcel
from mpiattn.dropout import Dropout
from mpiattn.mask import Mask, Positions
from mpiattn.problem import Problem

from .cupy.bounds import BoundsOf
from .cupy.kernel import CupyKernel, Progress
from .cupy.passes import RowPass, packed_pass
from .sums import Sums

Array = Any

LARGEST_HEAD = 256
MOST_PIECES = 16  # of a block; with more, such as many documents, each plan would be used too seldom
ALIGNMENT = 16  # bytes
SQUARE = 128  # keys before a diagonal from which on they are a piece of their own: cuDNN is faster at squares


@functools.cache
def library() -> tuple[Any, str]:
    """Return cuDNN's frontend, or None and why it can't be used."""
    if importlib.util.find_spec("cudnn") is None:
        return None, "nvidia-cudnn-frontend is not installed"
    import cudnn

    try:
        cudnn.backend_version()
    except Exception as error:
        return None, f"the cuDNN library does not load ({error})"
    return cudnn, ""


def unable(problem: Problem) -> str:
    """Return why cuDNN can't do a problem, the empty string if it can."""
    cudnn, reason = library()
    if cudnn is None:
        return reason
    if problem.dtype.name not in ("float16", "bfloat16"):
        return f"cuDNN attends in float16 and bfloat16, not {problem.dtype.name}"
    for name, dim in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
        if dim % 8 or dim > LARGEST_HEAD:
            return f"cuDNN needs a {name} of 8, 16, ..., {LARGEST_HEAD}, not {dim}"
    return ""


class Piece(NamedTuple):
    """A rectangle of a block in which every query sees a run of keys of one of four forms.

    Attributes
    ----------
    queries, keys : slice
    causal : bool
        Each query sees one key more than the one before, and the last query the last key.
    left : int, optional
        Each query's run begins one key later than the one before's. Where `causal` too, runs have this many
        keys; else it is 1, and the first query sees the first key.
    q_positions, k_positions : int64
        Global positions of the queries and keys.
    """

    queries: slice
    keys: slice
    causal: bool
    left: int | None
    q_positions: Positions
    k_positions: Positions


def pieces(
    start: NDArray[np.int32], stop: NDArray[np.int32], q_positions: Positions, k_positions: Positions
) -> list[Piece] | None:
    """Cut a block into pieces that cuDNN can do, or return None where they would be too many.

    Parameters
    ----------
    start, stop : int32, (queries,)
        Each query sees the keys of indices [start, stop).
    """
    seeing = start < stop
    steps = np.stack([np.diff(start), np.diff(stop)])
    usual = np.isin(steps, (0, 1)).all(axis=0) & seeing[1:] & seeing[:-1]  # query i + 1 may follow i in a piece
    breaks = np.flatnonzero((np.diff(steps) != 0).any(axis=0)) + 1
    result: list[Piece] = []
    first = 0
    while first < len(start):
        last = first
        if first < len(usual) and usual[first]:
            ends = breaks[np.searchsorted(breaks, first, side="right") :]
            last = int(ends[0]) if len(ends) else len(usual)
            last = first + int(np.argmin(np.append(usual[first:last], False)))
        if seeing[first]:
            queries, keys = slice(first, last + 1), slice(int(start[first]), int(stop[last]))
            later, more = (last > first and bool(step[first]) for step in steps)
            left = (int(stop[first] - start[first]) if more else 1) if later else None
            before = keys.stop - keys.start - (queries.stop - queries.start)  # keys that the first query sees
            if SQUARE and more and left is None and before >= SQUARE:
                seen = slice(keys.start, keys.start + before)
                result.append(Piece(queries, seen, False, None, q_positions[queries], k_positions[seen]))
                keys = slice(seen.stop, keys.stop)
            result.append(Piece(queries, keys, more, left, q_positions[queries], k_positions[keys]))
            if len(result) > MOST_PIECES:
                return None
        first = last + 1
    return result


class Plan:
    """A built graph of cuDNN: forward or backward attention of one shape."""

    def __init__(self, graph: Any, tensors: Sequence[Any]) -> None:
        self.graph = graph
        self.workspace = int(graph.get_workspace_size())
        self.uids = [tensor.get_uid() for tensor in tensors]

    def __call__(self, handle: int, workspace: int, *pointers: int) -> None:
        """Queue the work; pointers in the order of the tensors."""
        self.graph.execute(dict(zip(self.uids, pointers, strict=True)), workspace, handle)


class Tensor(NamedTuple):
    """Shape and strides in elements: what a plan depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """Return those of an array."""
        return cls(array.shape, tuple(stride // array.itemsize for stride in array.strides))

    @classmethod
    def packed(cls, *shape: int) -> Tensor:
        """Return those of an array without gaps."""
        return cls(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


@functools.cache
def handle_of(device: int) -> int:
    """Return cuDNN's handle for a device."""
    return int(library()[0].create_handle())


@functools.cache
def build(device: int, dtype: str, scale: float, causal: bool, left: int | None, *tensors: Tensor) -> Plan | None:
    """Return the plan for q, k, v (forward), or for q, k, v, d_out, out (backward); None where cuDNN has none."""
    cudnn, _ = library()
    half, single = getattr(cudnn.data_type, "HALF" if dtype == "float16" else "BFLOAT16"), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle_of(device)
    )
    square = tensors[0].shape[2] == tensors[1].shape[2]  # both corners are one then; cuDNN is faster at the top left
    alignment = getattr(cudnn.diagonal_alignment, "BOTTOM_RIGHT" if causal and not square else "TOP_LEFT")
    band = {"diagonal_alignment": alignment, "diagonal_band_left_bound": left}
    if causal:
        band["diagonal_band_right_bound"] = 0

    def tensor(name: str, like: Tensor, data_type: Any = half) -> Any:
        return graph.tensor(name=name, dim=list(like.shape), stride=list(like.strides), data_type=data_type)

    def result(output: Any, like: Tensor, data_type: Any = half) -> Any:
        return output.set_output(True).set_dim(list(like.shape)).set_stride(list(like.strides)).set_data_type(data_type)

    inputs = [tensor(name, like) for name, like in zip("qkv", tensors, strict=False)]
    (batch, heads, queries, _), v_dim = tensors[0].shape, tensors[2].shape[3]
    packed_out = Tensor.packed(batch, heads, queries, v_dim)
    if len(tensors) == 3:
        out, stats = graph.sdpa(
            name="forward", q=inputs[0], k=inputs[1], v=inputs[2], attn_scale=scale, generate_stats=True, **band
        )
        result(out, packed_out)
        result(stats, Tensor.packed(batch, heads, queries, 1), single)
        ends = [*inputs, out, stats]
    else:
        rows = Tensor.packed(batch, heads, queries, 1)
        inputs += [tensor("o", tensors[4]), tensor("d_out", tensors[3]), tensor("lse", rows, single)]
        gradients = graph.sdpa_backward(
            **dict(zip(("q", "k", "v", "o", "dO", "stats"), inputs, strict=True)),
            name="backward", attn_scale=scale, **band,
        )  # fmt: skip
        for gradient, like in zip(gradients, tensors, strict=False):
            result(gradient, Tensor.packed(*like.shape))
        ends = [*inputs, *gradients]
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError):
        return None
    return Plan(graph, ends)


Call = Callable[..., None]

TOGETHER = 4  # shares that one pass adds up


class Share(NamedTuple):
    """What a call computed: rows of tokens first, first + 1, ..., and the lse of each where they are of an output."""

    rows: Array
    lse: Array | None
    first: int


@dataclass
class Waiting:
    """A sum that began as nothing, and the shares that wait to be added to it."""

    total: Array  # while it is kept, its address is given to no other array
    lse: Array | None
    shares: list[Share] = field(default_factory=list)
    written: bool = False
    """Whether the sum's own memory already holds a part of it."""

    def first(self, array: Array) -> int | None:
        """Return which token of the sum an array of some of its rows begins with; None where it is another one's."""
        offset = int(array.data.ptr - self.total.data.ptr)
        if not 0 <= offset < self.total.nbytes:
            return None
        return offset // int(self.total.strides[2]) % int(self.total.shape[2])


class CudnnKernel(Sums):
    """Attention of one rank's block by cuDNN. Parameters, arrays and results: as `NumpyKernel`'s.

    Work is queued on the current stream; nothing waits for the device. Partial results are rounded to the
    inputs' dtype before they are merged or added up in float32; those of sums that were begun (see `sums.py`)
    wait until there are some, or the sum settles. Backward, the order in which cuDNN adds up a row of d_q
    differs from run to run, and with it its last bits.
    """

    name = "cudnn"

    def __init__(self, mask: Mask, scale: float | None, dtype: Any) -> None:
        self.scale, self.dtype = scale, dtype
        self.plain = CupyKernel(mask, scale)
        self.prepared: dict[tuple[Any, ...], tuple[Positions, Positions, list[Call]]] = {}
        self.work: dict[str, Array] = {}
        self.waiting: dict[int, Waiting] = {}
        self.remembered: tuple[Array, Array] | None = None

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop nothing: `choose` gives problems with dropout to the plain kernel."""
        assert dropout is None

    def remember(self, row_delta: Array, out: Array) -> None:
        """Keep the output: backward, cuDNN takes it instead of row_delta."""
        self.remembered = row_delta, out

    def begin(self, *sums: Array) -> None:
        """Let sums hold nothing; their memory is written when they settle."""
        lse = next((array for array in sums if array.ndim == 3), None)
        for total in (array for array in sums if array.ndim == 4 and array.size):
            self.waiting[total.data.ptr] = Waiting(total, lse)

    def settle(self, sums: Parcel, *arrived: Sequence[Array]) -> None:
        """Add up what waits and what arrived, rounded where the parcel is to be sent so."""
        if sums.sent_as is not None and self._begun(sums.views):
            self._end(sums.views, arrived, sums.sent_as.arrays)
            sums.rounded = True
        else:
            self._end(sums.arrays, arrived, sums.views)

    def complete(self, sums: Sequence[Array], *arrived: Sequence[Array]) -> Sequence[Array]:
        """Add up what waits and what arrived; return it rounded, in new memory, if the sum has not yet settled."""
        results = sums
        if self.rounds and self._begun(sums):
            results = [cupy.empty(array.shape, self.dtype if array.ndim == 4 else array.dtype) for array in sums]
        self._end(sums, arrived, results)
        return results

    def _begun(self, sums: Sequence[Array]) -> bool:
        return any(array.data.ptr in self.waiting for array in sums)

    def _end(self, sums: Sequence[Array], arrived: Sequence[Sequence[Array]], results: Sequence[Array]) -> None:
        for i, total in enumerate(sums):
            waiting = self.waiting.pop(total.data.ptr, None) if total.ndim == 4 else None
            if waiting is not None:
                self._add_up(waiting, results[i], results[i + 1 :], [shares[i:] for shares in arrived])
            elif i == 0:
                super().complete(sums, *arrived)
                return

    def _add_up(
        self, waiting: Waiting, result: Array, result_lse: Sequence[Array] = (), arrived: Sequence[Sequence[Array]] = ()
    ) -> None:
        """Write a sum, of what it held, what waits and what arrived, to a result of its dtype or the inputs'."""
        shares, (there, *there_lse) = waiting.shares, arrived[0] if arrived else (None,)
        pointers = [result, waiting.total if waiting.written else None, there]
        parts = [number for share in shares for number in (share.rows.data.ptr, share.first, share.rows.shape[2])]
        parts += [0] * 3 * (TOGETHER - len(shares))
        name = "sum_parts"
        if waiting.lse is not None:
            name = "merge_parts"
            before = waiting.lse.copy() if waiting.written else None  # threads still read it while one writes the new
            pointers += [result_lse[0], before, *(there_lse or [None])]
            parts += [share.lse.data.ptr for share in shares if share.lse is not None]
            parts += [0] * (TOGETHER - len(shares))
        pass_ = packed_pass(name, self.dtype, waiting.total.dtype if there is None else there.dtype, result)
        pass_(*(0 if array is None else array.data.ptr for array in pointers), more=parts)
        shares.clear()

    def _share(self, array: Array, rows: Array, first: int, lse: Array | None = None) -> bool:
        """Let a share wait for its sum, if that was begun; the share is of the array's rows from `first` on."""
        for waiting in self.waiting.values():
            start = waiting.first(array)
            if start is not None:
                if len(waiting.shares) == TOGETHER:
                    self._flush(waiting)
                waiting.shares.append(Share(rows, lse, start + first))
                return True
        return False

    def _flush(self, waiting: Waiting) -> None:
        """Write what a sum holds so far to its own memory."""
        self._add_up(waiting, waiting.total, [] if waiting.lse is None else [waiting.lse])
        waiting.written = True

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
        self._run(self._forward, q_positions, k_positions, [q, k, v], [out, lse])
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
            first = Waiting(row_delta[..., None], None).first(delta[..., None])
            if first is not None and delta.shape[:2] == row_delta.shape[:2]:
                others.append(_aligned(out[:, :, first : first + delta.shape[2]]))
        self._run(self._backward, q_positions, k_positions, [q, k, v, d_out], others)
        if progress:
            progress()

    def _run(
        self, prepare: Any, q_positions: Positions, k_positions: Positions, halves: list[Array], others: list[Array]
    ) -> None:
        """Queue the calls of a block; what depends on shapes and positions only is prepared once."""
        arrays = [*map(_aligned, halves), *others]
        shapes = [(array.shape, array.strides, array.data.ptr % ALIGNMENT) for array in arrays]
        key = (prepare, id(q_positions), id(k_positions), arrays[0].dtype, *shapes)
        if key not in self.prepared:
            if len(self.prepared) >= BoundsOf.KEPT:
                self.prepared.clear()
            bounds = self.plain.bounds(q_positions, k_positions)
            parts = pieces(bounds.start, bounds.stop, q_positions, k_positions)
            if parts is None:
                whole = slice(0, len(q_positions)), slice(0, len(k_positions))
                calls = [self._plain(Piece(*whole, False, None, q_positions, k_positions), len(arrays))]
            else:
                calls = [prepare(piece, *arrays) or self._plain(piece, len(arrays)) for piece in parts]
            # With the positions, so that their numbers in the key are not given to other arrays.
            self.prepared[key] = q_positions, k_positions, calls
        for call in self.prepared[key][2]:
            call(*arrays)

    def _forward(self, piece: Piece, *arrays: Array) -> Call | None:
        """Return what computes a piece forward, on arrays of these shapes; None where cuDNN can't."""
        views = _cut(piece, arrays)
        plan = self._plan(piece, arrays[0], *map(Tensor.of, views[:3]))
        if plan is None:
            return None
        q, _, v, out, lse = views
        rows, dtype, first = q.shape[:3], q.dtype, piece.queries.start
        shape, wide, offsets = (*rows, v.shape[3]), lse.dtype, _offsets(views, arrays)
        merge = RowPass("merge", wide, dtype, out, lse, cupy.empty(shape, dtype), cupy.empty(rows, wide))

        def call(*arrays: Array) -> None:
            q, k, v, out, lse = (array.data.ptr + offset for array, offset in zip(arrays, offsets, strict=True))
            part, part_lse = cupy.empty(shape, dtype), cupy.empty(rows, wide)
            self._execute(plan, q, k, v, part.data.ptr, part_lse.data.ptr)
            if not self._share(arrays[3], part, first, part_lse):
                merge(out, lse, part.data.ptr, part_lse.data.ptr)

        return call

    def _backward(self, piece: Piece, *arrays: Array) -> Call | None:
        """Return what computes a piece backward, on arrays of these shapes; None where cuDNN can't."""
        views = _cut(piece, arrays)
        q, k, v, d_out, lse, delta, d_q, d_k, d_v, *known = views
        rows, dtype = q.shape[:3], q.dtype
        near = cupy.empty(d_out.shape, dtype), cupy.empty(rows, lse.dtype)
        plan = self._plan(piece, q, *map(Tensor.of, (q, k, v, d_out, known[0] if known else near[0])))
        if plan is None:
            return None
        shapes = [array.shape for array in (q, k, v)]
        stand_in = RowPass("stand_in", lse.dtype, dtype, *near, d_out, lse, delta)
        adds = [
            RowPass("accumulate", lse.dtype, dtype, total, cupy.empty(shape, dtype))
            for total, shape in zip((d_q, d_k, d_v), shapes, strict=True)
        ]
        sizes, offsets, lse_packed = [array.nbytes for array in near], _offsets(views, arrays), lse.flags.c_contiguous
        firsts = piece.queries.start, piece.keys.start, piece.keys.start

        def call(*arrays: Array) -> None:
            pointers = [array.data.ptr + offset for array, offset in zip(arrays, offsets, strict=True)]
            (q, k, v, d_out, lse, delta), totals = pointers[:6], pointers[6:9]
            shares = [cupy.empty(shape, dtype) for shape in shapes]
            if len(pointers) > 9:
                out, near_lse = pointers[9], lse if lse_packed else self._copied(_cut(piece, arrays)[4])
            else:
                out, near_lse = self._buffers(sizes)
                stand_in(out, near_lse, d_out, lse, delta)
            self._execute(plan, q, k, v, out, d_out, near_lse, *(share.data.ptr for share in shares))
            for add, array, total, share, first in zip(adds, arrays[6:9], totals, shares, firsts, strict=True):
                if not self._share(array, share, first):
                    add(total, share.data.ptr)

        return call

    def _plain(self, piece: Piece, count: int) -> Call:
        """Return what computes a piece with the plain kernel."""
        compute: Any
        inputs, end, compute = (3, 5, self.plain.forward) if count == 5 else (6, 9, self.plain.backward)

        def call(*arrays: Array) -> None:
            for waiting in self.waiting.values():  # the plain kernel adds at once
                if not waiting.written and any(waiting.first(array) is not None for array in arrays):
                    self._flush(waiting)
            views = _cut(piece, arrays)
            compute(*views[:inputs], piece.q_positions, piece.k_positions, *views[inputs:end])

        return call

    def _plan(self, piece: Piece, q: Array, *tensors: Tensor) -> Plan | None:
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        return build(cupy.cuda.Device().id, q.dtype.name, float(scale), piece.causal, piece.left, *tensors)

    def _execute(self, plan: Plan, *pointers: int) -> None:
        handle = handle_of(cupy.cuda.Device().id)
        library()[0].set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
        [workspace] = self._buffers([plan.workspace], "workspace")
        plan(handle, workspace, *pointers)

    def _copied(self, rows: Array) -> int:
        """Return a pointer to a copy without gaps, in scratch memory."""
        self.work["lse"] = cupy.ascontiguousarray(rows)
        return int(self.work["lse"].data.ptr)

    def _buffers(self, sizes: Sequence[int], name: str = "") -> list[int]:
        """Return pointers to scratch memory of these sizes; it serves all calls in turn."""
        result = []
        for number, size in enumerate(sizes):
            key = f"{name}{number}"
            held = self.work.get(key)
            if held is None or held.nbytes < size:
                held = self.work[key] = cupy.empty(max(size, 1), np.uint8)
            result.append(held.data.ptr)
        return result


def _aligned(array: Array) -> Array:
    """Return the array, or a copy where cuDNN can't read it in place."""
    fits = array.strides[3] == array.itemsize and not any(stride % ALIGNMENT for stride in array.strides[:3])
    return array if fits and array.data.ptr % ALIGNMENT == 0 else array.copy(order="C")


def _cut(piece: Piece, arrays: Sequence[Array]) -> list[Array]:
    """Return a piece of a block's arrays: forward q, k, v, out, lse; backward q, k, v, ..., d_q, d_k, d_v."""
    of_keys = (1, 2) if len(arrays) == 5 else (1, 2, 7, 8)
    return [array[:, :, piece.keys if i in of_keys else piece.queries] for i, array in enumerate(arrays)]


def _offsets(views: Sequence[Array], arrays: Sequence[Array]) -> list[int]:
    return [view.data.ptr - array.data.ptr for view, array in zip(views, arrays, strict=True)]
