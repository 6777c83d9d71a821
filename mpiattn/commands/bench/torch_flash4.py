"""FlashAttention-4 as torch's own flash attention, for `mpiattn bench attention`; torch asks this module for it.

Torch takes two results of a forward call, of which newer versions of flash-attn-4 return five.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from ...kernels.flash4.library import loaded, unusable

Tensor = Any  # torch's, which is imported where there is one

LABEL = ", FA4"
"""At the end of the names of what is measured with it."""


def _flash_attn_fwd(*arrays: Tensor, **options: object) -> Sequence[Tensor]:
    out, lse, *_ = loaded()[0]._flash_attn_fwd(*arrays, **options)
    return out, lse


def _flash_attn_bwd(*arrays: Tensor, **options: object) -> Sequence[Tensor]:
    d_q, d_k, d_v = loaded()[0]._flash_attn_bwd(*arrays, **options)
    return d_q, d_k, d_v


@functools.cache
def offered() -> bool:
    """Return whether torch can attend by it here; from then on its flash attention is this one."""
    if unusable():
        return False
    try:
        import torch
        from torch.nn import functional
        from torch.nn.attention import SDPBackend, _fa4, sdpa_kernel

        _held.append(_fa4.register_flash_attention_fa4(__name__))
        q, k, v = (torch.randn(1, 1, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    except Exception as error:
        _held.clear()
        print(f"torch does not attend by FlashAttention-4 here: {error}", file=sys.stderr)
        return False
    return True


_held: list[Any] = []  # torch goes on with its own flash attention when this is given up
