"""One block on one thread, timed by turns: by the NumPy kernel, as its products alone, by the textbook, by torch."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from ...arrays import Array, accumulator
from ...arrays.softmax import LSE, delta
from ...kernels.contract import Kernel
from ...kernels.numpy.kernel import NumpyKernel
from ...kernels.numpy.tiles import plan
from ...problems.block import Block
from ...problems.mask import Mask

Timed = dict[str, Callable[[], object]]


def whole(q: Array, mask: Mask) -> Block:
    """Return the block of all queries against as many keys."""
    positions = np.arange(q.shape[2])
    return Block(mask, positions, positions)


def runs(
    q: Array, k: Array, v: Array, d_out: Array, mask: Mask, kernel_name: str = "numpy"
) -> Iterator[Callable[[], object]]:
    """Yield a kernel's forward and backward, each with accumulators of its own, set back at every run."""
    kernel, block, dtype = of_name(kernel_name), whole(q, mask), accumulator(q.dtype)
    out, lse = np.empty(d_out.shape, dtype), np.empty(q.shape[:3], LSE)
    d_q, d_k, d_v = np.empty(q.shape, dtype), np.empty(k.shape, dtype), np.empty(v.shape, dtype)

    def forward() -> None:
        out[...], lse[...] = 0, -np.inf
        kernel.forward(q, k, v, block=block, out=out, lse=lse)

    forward()
    row_sums = delta(d_out, out)

    def backward() -> None:
        d_q[...], d_k[...], d_v[...] = 0, 0, 0
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=lse, delta=row_sums, d_q=d_q, d_k=d_k, d_v=d_v)

    yield forward
    yield backward


def of_name(name: str) -> Kernel:
    """Return NumPy's kernel, or torch's."""
    if name == "numpy":
        return NumpyKernel()
    from ...kernels.torch.kernel import TorchKernel

    return TorchKernel()


def products(q: Array, k: Array, v: Array, d_out: Array, mask: Mask, name: str) -> Callable[[], object]:
    """Return the matrix products that the kernel can't do without, of the same tiles, and nothing else."""
    block = whole(q, mask)
    q, k, v, d_out = (x[0].astype(accumulator(x.dtype)) for x in (q, k, v, d_out))
    rows_of_tiles = [
        (
            [[np.ascontiguousarray(x[h, rows].T) for x in (q, d_out)] for h in range(len(q))],
            [(tile, slice(rows.start + tile.queries.start, rows.start + tile.queries.stop)) for tile in tiles],
        )
        for rows, tiles in plan(block)[1]
    ]
    sizes = {(t.keys.stop - t.keys.start, t.queries.stop - t.queries.start) for _, ts in rows_of_tiles for t, _ in ts}
    scores = {size: [np.empty(size, q.dtype) for _ in range(2)] for size in sizes}
    like_keys = {size: np.empty((size, q.shape[2]), q.dtype) for size, _ in sizes}
    like_queries = {size: np.empty((q.shape[2], size), q.dtype) for _, size in sizes}

    def run() -> None:
        for h in range(len(q)):
            for columns, tiles in rows_of_tiles:
                query, d_row = columns[h]
                for tile, rows in tiles:
                    keys, values = k[h, tile.keys], v[h, tile.keys]
                    size = len(keys), rows.stop - rows.start
                    score, d_score = scores[size]
                    np.matmul(keys, query[:, tile.queries], out=score)
                    if name == "forward":
                        np.matmul(values.T, score, out=like_queries[size[1]])
                        continue
                    np.matmul(values, d_row[:, tile.queries], out=d_score)
                    np.matmul(score, d_out[h, rows], out=like_keys[size[0]])
                    np.matmul(d_score, q[h, rows], out=like_keys[size[0]])
                    np.matmul(keys.T, d_score, out=like_queries[size[1]])

    return run


def textbook(q: Array, k: Array, v: Array, causal: bool) -> None:
    """Compute softmax(q k^T) v as the formula reads, head by head."""
    dtype = accumulator(q.dtype)
    for h in range(q.shape[1]):
        query, keys, values = (x[0, h].astype(dtype) for x in (q, k, v))
        scores = query @ keys.T / dtype.type(np.sqrt(q.shape[3]))
        if causal:
            scores = np.where(np.tri(len(query), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights / weights.sum(axis=1, keepdims=True) @ values


def torch_runs(q: Array, k: Array, v: Array, d_out: Array, causal: bool) -> Timed:
    """Return torch's forward and backward on the same numbers."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    dtype = getattr(torch, q.dtype.name)
    inputs = [torch.from_numpy(x.astype(np.float64)).to(dtype).requires_grad_() for x in (q, k, v)]
    gradient = torch.from_numpy(d_out.astype(np.float64)).to(dtype)
    out = attention(*inputs, is_causal=causal)

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs, is_causal=causal)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True),
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS, OpenMP and torch to one thread."""
    with threadpool_limits(1):
        if importlib.util.find_spec("torch"):
            import torch

            torch.set_num_threads(1)
        yield


def interleave(timed: dict[str, Timed], rounds: int, done: Callable[[], object]) -> dict[str, dict[str, list[float]]]:
    """Run all in turn, round after round; return the CPU seconds of each, without those of a first round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {other: [] for other in runs} for name, runs in timed.items()}
    for number in range(rounds + 1):
        for name, runs in timed.items():
            for other, run in runs.items():
                start = time.process_time()
                run()
                if number:
                    seconds[name][other].append(time.process_time() - start)
        done()
    return seconds


def peak_bytes(q: Array, k: Array, v: Array, d_out: Array, mask: Mask) -> list[int]:
    """Return the most memory that forward and backward take beyond their inputs, results included."""
    block, dtype = whole(q, mask), accumulator(q.dtype)
    peaks = []
    tracemalloc.start()
    out, lse = np.zeros(d_out.shape, dtype), np.full(q.shape[:3], -np.inf, LSE)
    NumpyKernel().forward(q, k, v, block=block, out=out, lse=lse)
    peaks.append(tracemalloc.get_traced_memory()[1])
    row_sums = delta(d_out, out)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    d_q, d_k, d_v = (np.zeros(array.shape, dtype) for array in (q, k, v))
    NumpyKernel().backward(q, k, v, block=block, d_out=d_out, lse=lse, delta=row_sums, d_q=d_q, d_k=d_k, d_v=d_v)
    peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return peaks
