"""Whether torch's kernel is the faster one here: measured once in a few milliseconds, where torch is loaded."""

from __future__ import annotations

import functools
import sys
import time

import numpy as np

from mpiattn.kernels.contract import Kernel
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Full
from mpiattn.problems.problem import Problem

MUCH = 1.5
"""Speed, relative to NumPy's kernel, that it must have: less could be noise, and other bits from run to run."""

SIZE = 1, 1, 384, 64
"""Shape of what is measured."""


def reason(problem: Problem, needs: set[str]) -> str:
    """Return why torch's kernel can't do a problem, nothing where it can."""
    if needs:
        return f"it has no {' and '.join(sorted(needs))}"
    if problem.head_dim != problem.v_head_dim:
        return f"q, k and v must have one head_dim, not {problem.head_dim} and {problem.v_head_dim}"
    return "" if importable() else "torch is not installed: pip install 'mpiattn[torch]'"


@functools.cache
def importable() -> bool:
    """Return whether there is a torch, and not only a folder of that name."""
    from importlib.util import find_spec

    found = find_spec("torch")
    return found is not None and found.origin is not None


@functools.cache
def faster(dtype: np.dtype[np.generic]) -> bool:
    """Return whether torch's kernel is much faster for a dtype of two bytes; torch is not loaded to find out."""
    if "torch" not in sys.modules or dtype.itemsize != 2 or not importable():
        return False
    from ..numpy.kernel import NumpyKernel
    from .kernel import TorchKernel

    return seconds(NumpyKernel(), dtype) > MUCH * seconds(TorchKernel(), dtype)


def seconds(kernel: Kernel, dtype: np.dtype[np.generic]) -> float:
    """Return the least time of three that a kernel takes for a small block."""
    q, k, v = np.random.default_rng(0).standard_normal((3, *SIZE)).astype(dtype)
    block, times = Block(Full(), np.arange(SIZE[2]), np.arange(SIZE[2])), []
    for _ in range(4):
        out, lse = np.zeros(SIZE, np.float32), np.full(SIZE[:3], -np.inf)
        start = time.perf_counter()
        kernel.forward(q, k, v, block=block, out=out, lse=lse)
        times.append(time.perf_counter() - start)
    return min(times[1:])
