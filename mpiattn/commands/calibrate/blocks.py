"""The kernel's rate by the size of a block."""

from __future__ import annotations

import time
from types import ModuleType

import numpy as np

from ... import kernels
from ...arrays import accumulator
from ...arrays.operations import cast
from ...arrays.softmax import LSE
from ...machines.machine import operations
from ...messages.message import Communicator
from ...problems.mask import Full
from ...problems.problem import Problem
from .. import gpu
from .rounds import median

QUEUED = 10
"""Calls that a GPU has certainly room for in its queue."""


def rates(
    comm: Communicator, shape: tuple[int, int, int, int], dtype: np.dtype[np.generic], name: str | None, rounds: int,
    xp: ModuleType,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the operations per second of a block, forward and backward, all ranks at once.

    And the seconds that a rank spends to queue a call, before the device can start; 0 without a GPU. Queries, keys
    and values all have the same `shape`; `name` is the kernel's, None: the fastest one's.
    """
    _, heads, tokens, head_dim = shape
    if xp is np:
        q, k, v, d_out = np.random.default_rng(0).standard_normal((4, *shape)).astype(dtype)
    else:
        q, k, v, d_out = (cast(xp.random.standard_normal(shape, dtype=np.float32), dtype) for _ in range(4))
    wide = accumulator(dtype)
    problem = Problem(1, 1, heads, heads, head_dim, head_dim, tokens, tokens, dtype, "contiguous", Full())
    kernel, block = kernels.choose(xp.__name__, problem, name=name), problem.block(0, 0)
    assert block is not None
    out, lse = xp.zeros(shape, wide), xp.full(shape[:3], -np.inf, LSE)
    d_q, d_k, d_v = (xp.zeros(shape, wide) for _ in "qkv")

    def forward() -> None:
        if xp is not np:
            kernel.begin(out, lse)  # what follows waits there: adding it up is not part of the block's time
        kernel.forward(q, k, v, block=block, out=out, lse=lse)

    def backward() -> None:
        if xp is not np:
            for total in (d_q, d_k, d_v):
                kernel.begin(total)
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=final, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v)

    seconds = median(comm, rounds, forward, xp)
    delta, final = xp.zeros(shape[:3], wide), lse if xp is np else xp.full(shape[:3], np.log(tokens), LSE)
    seconds_backward = median(comm, rounds, backward, xp)
    queueing = 0.0
    if xp is not np:
        gpu.wait(xp)
        start = time.perf_counter()
        for _ in range(QUEUED):
            forward()
            backward()
        queueing = max(comm.allgather((time.perf_counter() - start) / (2 * QUEUED)))
        gpu.wait(xp)
    forward_work, backward_work = (heads * tokens**2 * operations(head_dim, head_dim, back) for back in (False, True))
    return forward_work / seconds, backward_work / seconds_backward, queueing
