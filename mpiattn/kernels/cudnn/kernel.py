"""Block attention on one rank by cuDNN."""

from __future__ import annotations

import numpy as np

from ..pieces.kernel import PieceKernel
from .plans import build


class CudnnKernel(PieceKernel):
    """Attention of one rank's block by cuDNN; parameters as `PieceKernel`'s.

    Backward, the order in which cuDNN adds up a row of d_q differs from run to run, and with it its last bits.
    """

    def __init__(self, scale: float | None, dtype: np.dtype[np.generic], rounds: bool = True) -> None:
        super().__init__("cudnn", build, scale, dtype, rounds)
