"""Trial of a library's kernel on this machine: a small problem with the same heads, beside the kernel that is right.

Libraries' kernels have been wrong without a word: cuDNN's with few K/V heads on a new chip (pytorch#193893), and
FlashAttention-4's dQ on Hopper with some head_dims that are no multiples of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ..arrays import Array, accumulator
from ..arrays.operations import cast
from ..arrays.softmax import LSE, delta
from ..problems.block import Block
from ..problems.mask import Causal
from .contract import Kernel

TOKENS = 288
"""More than two tiles of any kernel, and not a multiple of one."""

TOLERANCE = 0.03
"""Of the difference's norm, relative to the right result's: rounding to bfloat16 makes 0.003, a missing tile 0.3."""

Results = dict[str, Array]


def fault(
    kernel: Kernel, right: Kernel, xp: ModuleType, dtype: np.dtype[np.generic], group: int, head_dim: int,
    v_head_dim: int,
) -> str:  # fmt: skip
    """Return the first thing that is wrong with a kernel's results, the empty string if nothing is.

    Parameters
    ----------
    kernel, right : Kernel
        The one on trial, and one whose results are right.
    xp : module
        Whose arrays they take.
    dtype : numpy dtype
    group : int
        Query heads to a K/V head.
    head_dim, v_head_dim : int
    """
    rng = np.random.default_rng(0)
    shapes = (group, head_dim), (1, head_dim), (1, v_head_dim), (group, v_head_dim)
    inputs = [xp.asarray(rng.standard_normal((1, heads, TOKENS, dim)).astype(dtype)) for heads, dim in shapes]
    expected = _results(right, xp, inputs)
    try:
        found = _results(kernel, xp, inputs, expected)
    except Exception as error:  # of a library or a driver: any
        return f"it fails here ({error})"
    for name, array in found.items():
        near, far = (each.astype(np.float32).ravel() for each in (array, expected[name]))
        off = float(xp.linalg.norm(near - far) / xp.linalg.norm(far))
        if not off < TOLERANCE:  # nor NaN
            return f"its {name} is wrong here, by {off:.1g} of its norm"
    return ""


def _results(kernel: Kernel, xp: ModuleType, inputs: Sequence[Array], expected: Results | None = None) -> Results:
    """Return what a kernel computes forward, and backward from what is expected forward, if that is given."""
    q, k, v, d_out = inputs
    where, wide = np.arange(TOKENS), accumulator(q.dtype)
    block = Block(Causal(), where, where)
    out, lse = xp.empty(d_out.shape, wide), xp.empty(q.shape[:3], LSE)
    kernel.begin(out, lse)
    kernel.forward(q, k, v, block=block, out=out, lse=lse)
    out, lse = kernel.complete((out, lse))
    results = {"out": cast(out, q.dtype), "lse": lse}
    saved = expected or results
    row_delta = delta(d_out, saved["out"])
    kernel.remember(row_delta, saved["out"])
    for name, array in (("d_q", q), ("d_k", k), ("d_v", v)):
        results[name] = xp.empty(array.shape, wide)
    sums = [results[name] for name in ("d_q", "d_k", "d_v")]
    kernel.begin(*sums)
    kernel.backward(
        q, k, v, block=block, d_out=d_out, lse=saved["lse"], delta=row_delta, d_q=sums[0], d_k=sums[1], d_v=sums[2]
    )
    for name, total in zip(("d_q", "d_k", "d_v"), sums, strict=True):
        [results[name]] = kernel.complete([total])
    return results
