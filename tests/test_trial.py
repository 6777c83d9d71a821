"""A kernel on trial beside NumPy's: nothing is wrong with NumPy's own, and what is wrong with others is found."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpiattn.arrays import Array
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.kernels.trial import fault

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Broken(NumpyKernel):
    """NumPy's, with one thing wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, q: Array, k: Array, v: Array, *, out: Array, lse: Array, **others: Any) -> None:
        """Leave out a row's part, or end."""
        if self.what == "raises":
            raise RuntimeError("no kernel image is available")
        super().forward(q, k, v, out=out, lse=lse, **others)
        if self.what == "out":
            out[:, :, 128:256] = 0
        if self.what == "lse":
            lse[:, :, 0] = np.nan

    def backward(self, q: Array, k: Array, v: Array, **others: Any) -> None:
        """Write nothing to a tile of a gradient, as FlashAttention-4 with some head dims."""
        super().backward(q, k, v, **others)
        if self.what in others:
            others[self.what][:, :, 128:256] = 0


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("group", [1, 8])
def test_nothing_is_wrong(dtype: np.dtype[np.generic], group: int) -> None:
    assert fault(NumpyKernel(), NumpyKernel(), np, dtype, group, 64, 32) == ""


@pytest.mark.parametrize("what", ["out", "lse", "d_q", "d_k", "d_v"])
def test_what_is_wrong_is_found(what: str) -> None:
    assert f"its {what} is wrong here" in fault(Broken(what), NumpyKernel(), np, BFLOAT16, 4, 64, 64)


def test_an_error_of_the_library_is_a_reason() -> None:
    reason = fault(Broken("raises"), NumpyKernel(), np, BFLOAT16, 1, 64, 64)
    assert reason == "it fails here (no kernel image is available)"
