"""Measure what the NumPy kernel takes longer with large scores: queries 1, 4, 40 and 10 million times as large.

OMP_NUM_THREADS=1 python benchmarks/kernel/large_scores.py | tee large_scores.txt

2,048 tokens, 8 heads of 64, float32, one thread; CPU time, the median of rounds in which all take turns.
"""

from __future__ import annotations

import math
import statistics
import sys

import numpy as np
from tabulate import tabulate

from mpiattn.arrays import Array
from mpiattn.commands.bench.block import interleave, one_thread, runs
from mpiattn.commands.bench.kernel import MASKS
from mpiattn.commands.env.environment import cpu_model
from mpiattn.kernels.numpy.scores import form_of

FACTORS = (1, 4, 40, 10**7)
SHAPE = (1, 8, 2048, 64)
ROUNDS = 5
PASSES = ("forward", "backward")
HEADERS = ("mask", "queries", "scores", "forward", "of x 1", "backward", "of x 1")


def kind(q: Array, k: Array) -> str:
    """Return how the kernel computes the scores of the first head."""
    form = form_of(q[0, 0], k[0, 0], 1 / math.sqrt(q.shape[3]), None, q.dtype)
    return f"{form.dtype}{', fixed order' if form.sliced else ''}"


def measure(mask: str) -> list[list[str]]:
    """Return a row of the table for each factor."""
    random = np.random.default_rng(0)
    q, k, v, d_out = (random.standard_normal(SHAPE).astype("float32") for _ in range(4))
    larger = {str(factor): q * np.float32(factor) for factor in FACTORS}
    own = {factor: dict(zip(PASSES, runs(q, k, v, d_out, MASKS[mask]), strict=True)) for factor, q in larger.items()}
    timed = {name: {factor: both[name] for factor, both in own.items()} for name in PASSES}
    seconds = interleave(timed, ROUNDS, lambda: None)
    rows = []
    for factor, q in larger.items():
        row = [mask, f"x {factor}", kind(q, k)]
        for name in PASSES:
            own_times, first = seconds[name][factor], seconds[name]["1"]
            ratio = statistics.median(own / plain for own, plain in zip(own_times, first, strict=True))
            row += [f"{1e3 * statistics.median(own_times):.0f} ms", f"{ratio:.2f}"]
        rows.append(row)
    return rows


def main() -> None:
    """Print the table."""
    with one_thread():
        rows = [row for mask in MASKS for row in measure(mask)]
    print(tabulate(rows, HEADERS, disable_numparse=True, stralign="right"))
    print(f"{cpu_model()}, NumPy {np.__version__}, Python {sys.version.split()[0]}; median of {ROUNDS} rounds")


if __name__ == "__main__":
    main()
