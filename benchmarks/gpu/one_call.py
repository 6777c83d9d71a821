"""What a call of each kernel takes on one GPU: speed, and how long the host needs to queue it.

    python benchmarks/gpu/one_call.py [KERNEL ...]

bfloat16, heads of 128. Medians of rounds in which the kernels take turns; backward, without forward, counts 2.5 times
its operations. queued: microseconds until a call returns, while the GPU is busy with calls before it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import cupy as cp
import numpy as np

from mpiattn import arrays, kernels
from mpiattn.arrays.cupy import rows
from mpiattn.arrays.operations import cast
from mpiattn.errors import InputError
from mpiattn.kernels.contract import Kernel
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Causal, Full
from mpiattn.problems.problem import Problem

DIM, ROUNDS, SECONDS = 128, 7, 0.03
BFLOAT16 = arrays.dtype("bfloat16")
SHAPES = (
    (32, 32, 2048, "full"), (32, 32, 4096, "full"), (32, 32, 8192, "full"), (32, 32, 16384, "full"),
    (32, 32, 4096, "causal"), (32, 32, 16384, "causal"), (64, 8, 8192, "full"), (32, 8, 8192, "full"),
)  # fmt: skip


def random(*shape: int) -> cp.ndarray:
    """Return random numbers."""
    return cast(cp.random.standard_normal(shape, dtype=np.float32), BFLOAT16)


def timed(run: Callable[[], object], calls: int) -> tuple[float, float]:
    """Return the seconds of a call on the GPU, and those until it is queued."""
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    queued = time.perf_counter() - before
    end.record()
    end.synchronize()
    return cp.cuda.get_elapsed_time(start, end) / 1e3 / calls, queued / calls


def measure(names: list[str], heads: int, kv_heads: int, tokens: int, how: str) -> None:
    """Measure the kernels of these names on one block, and print."""
    mask, where = Causal() if how == "causal" else Full(), np.arange(tokens)
    problem = Problem(1, 1, heads, kv_heads, DIM, DIM, tokens, tokens, BFLOAT16, "contiguous", mask)
    block = Block(mask, where, where)
    q, d_out = (random(1, heads, tokens, DIM) for _ in "qo")
    k, v = (random(1, kv_heads, tokens, DIM) for _ in "kv")
    out, lse = cp.empty(q.shape, np.float32), cp.empty(q.shape[:3])
    totals = [cp.empty(array.shape, np.float32) for array in (q, k, v)]

    def forward(kernel: Kernel) -> tuple[cp.ndarray, ...]:
        kernel.begin(out, lse)
        kernel.forward(q, k, v, block=block, out=out, lse=lse)
        return tuple(kernel.complete((out, lse)))

    def backward(kernel: Kernel, saved: cp.ndarray, final: cp.ndarray, row_delta: cp.ndarray) -> None:
        kernel.remember(row_delta, saved)
        for total in totals:
            kernel.begin(total)
        sums = dict(zip(("d_q", "d_k", "d_v"), totals, strict=True))
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=final, delta=row_delta, **sums)
        for total in totals:
            kernel.complete((total,))

    operations = 4 * heads * block.pairs * DIM
    runs: dict[tuple[str, str], tuple[Callable[[], object], float]] = {}
    for name in names:
        kernel = kernels.choose("cupy", problem, name=name)
        saved, final = forward(kernel)
        runs[name, "forward"] = partial(forward, kernel), operations
        runs[name, "backward"] = partial(backward, kernel, saved, final, rows.delta(d_out, saved)), operations * 2.5
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for round_ in range(ROUNDS + 1):
        for key, (run, work) in runs.items():
            result = timed(run, max(5, int(SECONDS * 5e14 / work)))
            if round_:
                seconds[key].append(result)
    for (name, way), (_, work) in runs.items():
        taken, queued = (statistics.median(column) for column in zip(*seconds[name, way], strict=True))
        print(
            f"{heads:3}/{kv_heads:<2} heads {tokens:6} tokens {how:6} {name:6} {way:8} "
            f"{taken * 1e3:8.3f} ms {work / taken / 1e12:5.0f} TFLOP/s   queued {queued * 1e6:5.0f} us",
            flush=True,
        )


def there(name: str) -> bool:
    """Return whether a kernel can be measured here, and say if not."""
    try:
        kernels.choose("cupy", Problem(1, 1, 1, 1, DIM, DIM, 8, 8, BFLOAT16, "contiguous", Full()), name=name)
    except InputError as error:
        print(error)
        return False
    return True


print(f"machine: {cp.cuda.runtime.getDeviceProperties(0)['name'].decode()}; {kernels.on_gpus()}")
chosen = [name for name in sys.argv[1:] or ("flash4", "cudnn") if there(name)]
for shape in SHAPES:
    measure(chosen, *shape)
