"""Block attention on one rank by FlashAttention-4."""

from __future__ import annotations

import functools

import numpy as np

from ..pieces.kernel import PieceKernel
from .plans import build


class Flash4Kernel(PieceKernel):
    """Attention of one rank's block by FlashAttention-4; parameters as `PieceKernel`'s.

    Parameters
    ----------
    deterministic : bool
        Whether d_q, and with fewer K/V heads d_k and d_v, are added up in one order: else their last bits differ from
        run to run.
    """

    def __init__(
        self, scale: float | None, dtype: np.dtype[np.generic], rounds: bool = True, deterministic: bool = False
    ) -> None:
        plans = functools.partial(build, deterministic=deterministic)
        # It is as fast at a diagonal that ends at the last key as at a square: benchmarks/gpu/own_block_flash4.txt.
        super().__init__("flash4", plans, scale, dtype, rounds, square=None)
