"""A tensor where an array is meant: refused with what takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mpiattn


@pytest.mark.mpi(max_size=4)
def test_a_tensor_is_no_array(comm: Any) -> None:
    with mpiattn.RingAttention(comm) as attention:
        q: Any = torch.zeros(1, 2, 3, 4)
        with pytest.raises(
            mpiattn.InputError, match=r"q on rank 0 is a tensor of torch: mpiattn\.torch\.attention takes it"
        ):
            attention.forward(q, q, q)
