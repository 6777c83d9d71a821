"""What a library takes for a rank's own block, whole and in the two parts of the ring's backward pass.

    python benchmarks/gpu/own_block.py [KERNEL]

Milliseconds; early: the queries that see half of the pairs, late: the others. "square" cuts the late part in a
rectangle and a square, as the package does for cuDNN, "bottom right" leaves it whole, as it does for FlashAttention-4.
Whole and early are the same in both: what they differ by is noise. host: until the call is queued.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial

import cupy as cp
import numpy as np

from mpiattn import arrays
from mpiattn.arrays.cupy import rows
from mpiattn.arrays.operations import cast
from mpiattn.kernels.cudnn.kernel import CudnnKernel
from mpiattn.kernels.flash4.kernel import Flash4Kernel
from mpiattn.kernels.pieces.cut import SQUARE
from mpiattn.kernels.pieces.kernel import PieceKernel
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Causal

HEADS, DIM = 32, 128
BFLOAT16 = arrays.dtype("bfloat16")
KERNELS: dict[str, type[CudnnKernel | Flash4Kernel]] = {"cudnn": CudnnKernel, "flash4": Flash4Kernel}
NAME = (*sys.argv[1:], "cudnn")[0]


def random(*shape: int) -> cp.ndarray:
    """Return random numbers."""
    return cast(cp.random.standard_normal(shape, dtype=np.float32), BFLOAT16)


def timed(run: Callable[[], object], calls: int = 10) -> tuple[float, float]:
    """Return the milliseconds of a call, and those until it is queued."""
    for _ in range(3):
        run()
    cp.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    queued = time.perf_counter() - start
    cp.cuda.Device().synchronize()
    return (time.perf_counter() - start) / calls * 1e3, queued / calls * 1e3


def measure(tokens: int) -> None:
    """Measure and print, for a block of so many queries."""
    q, k, v, d_out, saved = (random(1, HEADS, tokens, DIM) for _ in range(5))
    lse, row_delta = cp.full((1, HEADS, tokens), 9.0, np.float32), rows.delta(d_out, saved)
    totals = [cp.zeros(q.shape, np.float32) for _ in "qkv"]
    out, out_lse = cp.zeros(q.shape, np.float32), cp.zeros((1, HEADS, tokens), np.float32)
    everything, half = np.arange(tokens), int(tokens * math.sqrt(0.5)) // 128 * 128
    parts = [
        Block(Causal(), everything[rows], everything, rows)
        for rows in (slice(None), slice(0, half), slice(half, tokens))
    ]

    def backward(kernel: PieceKernel, block: Block) -> None:
        kernel.remember(row_delta, saved)
        for total in totals:
            kernel.begin(total)
        sums = dict(zip(("d_q", "d_k", "d_v"), totals, strict=True))
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=lse, delta=row_delta, **sums)

    def forward(kernel: PieceKernel, block: Block) -> None:
        kernel.begin(out, out_lse)
        kernel.forward(q, k, v, block=block, out=out, lse=out_lse)

    for label, square in (("square", SQUARE), ("bottom right", None)):
        kernel = KERNELS[NAME](None, BFLOAT16)
        kernel.square = square
        (w, hw), (e, _), (l, hl) = (timed(partial(backward, kernel, part)) for part in parts)
        (fw, _), (fe, _), (fl, fh) = (timed(partial(forward, kernel, part)) for part in parts)
        print(
            f"T={tokens}, {tokens - half} late, {label}: "
            f"bwd whole {w:.3f} early {e:.3f} late {l:.3f} (host {hw:.3f} {hl:.3f}) | "
            f"fwd whole {fw:.3f} early {fe:.3f} late {fl:.3f} (host {fh:.3f})"
        )


print(f"kernel: {NAME}; machine: {cp.cuda.runtime.getDeviceProperties(0)['name'].decode()}")
for length in (2048, 4096, 6144, 8192, 16384, 32768):
    measure(length)
