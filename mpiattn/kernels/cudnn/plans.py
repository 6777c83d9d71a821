"""cuDNN's plans: the attention of one shape, built once and queued for each piece of that shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from mpiattn.arrays.cupy.place import Place

from ..pieces.scratch import Scratch
from .library import handle_of, loaded, may_overflow


class Graph:
    """A built graph of cuDNN: forward or backward attention of one shape."""

    def __init__(self, graph: Any, tensors: Sequence[Any]) -> None:
        self.graph = graph
        self.workspace = int(graph.get_workspace_size())
        self.uids = [tensor.get_uid() for tensor in tensors]

    def __call__(self, scratch: Scratch, *pointers: int) -> None:
        """Queue the work on the current stream; pointers in the order of the tensors."""
        handle = handle_of(cupy.cuda.Device().id)
        loaded()[0].set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
        [workspace] = scratch.buffers([self.workspace], "workspace")
        self.graph.execute(dict(zip(self.uids, pointers, strict=True)), workspace, handle)


@functools.cache
def build(device: int, dtype: str, scale: float, causal: bool, left: int | None, *places: Place) -> Graph | None:
    """Return the plan for q, k, v (forward), or for q, k, v, d_out, out (backward); None where cuDNN has none."""
    if len(places) > 3 and not causal and may_overflow(places[1].shape[2]):
        return None
    cudnn, _ = loaded()
    half, single = getattr(cudnn.data_type, "HALF" if dtype == "float16" else "BFLOAT16"), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle_of(device)
    )
    square = places[0].shape[2] == places[1].shape[2]  # both corners are one then; cuDNN is faster at the top left
    alignment = getattr(cudnn.diagonal_alignment, "BOTTOM_RIGHT" if causal and not square else "TOP_LEFT")
    band = {"diagonal_alignment": alignment, "diagonal_band_left_bound": left}
    if causal:
        band["diagonal_band_right_bound"] = 0

    def tensor(name: str, like: Place, data_type: Any = half) -> Any:
        return graph.tensor(name=name, dim=list(like.shape), stride=like.steps, data_type=data_type)

    def result(output: Any, like: Place, data_type: Any = half) -> Any:
        return output.set_output(True).set_dim(list(like.shape)).set_stride(like.steps).set_data_type(data_type)

    inputs = [tensor(name, like) for name, like in zip("qkv", places, strict=False)]
    (batch, heads, queries, _), v_dim = places[0].shape, places[2].shape[3]
    rows = Place.packed((batch, heads, queries, 1), np.float32)
    if len(places) == 3:
        out, stats = graph.sdpa(
            name="forward", q=inputs[0], k=inputs[1], v=inputs[2], attn_scale=scale, generate_stats=True, **band
        )
        result(out, Place.packed((batch, heads, queries, v_dim), dtype))
        result(stats, rows, single)
        ends = [*inputs, out, stats]
    else:
        inputs += [tensor("o", places[4]), tensor("d_out", places[3]), tensor("lse", rows, single)]
        gradients = graph.sdpa_backward(
            **dict(zip(("q", "k", "v", "o", "dO", "stats"), inputs, strict=True)),
            name="backward", attn_scale=scale, **band,
        )  # fmt: skip
        for gradient, like in zip(gradients, places, strict=False):
            result(gradient, Place.packed(like.shape, dtype))
        ends = [*inputs, *gradients]
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError):
        return None
    return Graph(graph, ends)
