"""FlashAttention-4: whether it is there, and which problems it can do."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from mpiattn.problems.problem import Problem

from ..pieces.library import found, unfit_dtype, unfit_heads

Interface = Any  # the library's module `flash_attn.cute.interface`

NAME = "FlashAttention-4"
NEEDED = "torch", "tvm_ffi", "cutlass", "flash_attn.cute"
QUEUES = "_flash_attn_fwd", "_bwd_preprocess", "_flash_attn_bwd", "_bwd_postprocess_convert"
"""The library's functions that compile kernels and queue them; each keeps them in its `compile_cache`."""

LARGEST_HEAD = {9: 256, 10: 128}
"""By the generation of the chip: Hopper, and Blackwell of data centers."""

STEP = {9: 32, 10: 8}
"""Of head_dim. On Hopper it also takes 8, 16, 40, 48, 72, 80 and 112, and gives a wrong dQ, with 112 where causal
(4.0.0b36, an H200)."""

WIDE_HEADS = (192, 128), (256, 256)
"""Pairs of head_dim and v_head_dim beyond, on Blackwell."""


@functools.cache
def loaded() -> tuple[Interface, str]:
    """Return the library's module, or None and why it can't be used."""
    if reason := missing():
        return None, reason
    # A kernel compiles for seconds: the library then keeps it on disk, for the next process too.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flash_attn.cute import interface
    except Exception as error:
        return None, f"flash_attn.cute does not load ({error})"
    if not all(hasattr(getattr(interface, name, None), "compile_cache") for name in QUEUES):
        return None, "this version of flash-attn-4 is another one than the kernel knows: pip install 'mpiattn[flash4]'"
    return interface, ""


def missing() -> str:
    """Return which of the packages is not installed, the empty string if all are; none is imported but parents."""
    names = (name for name in NEEDED if found(name) is None)
    return next((f"{name} is not installed: pip install 'mpiattn[flash4]'" for name in names), "")


def unusable() -> str:
    """Return why FlashAttention-4 can't be used on the current GPU, the empty string if it can."""
    return unknown(generation()) or loaded()[1]


def unable(problem: Problem, scale: float | None = None) -> str:
    """Return why FlashAttention-4 can't do a problem on the current GPU, the empty string if it can."""
    if reason := unfit_dtype(NAME, problem):
        return reason
    if scale is not None and scale <= 0:
        return f"FlashAttention-4 needs a scale above zero, not {scale}"
    chip = generation()
    return unknown(chip) or unfit(chip, problem) or loaded()[1]


def generation() -> int:
    """Return the generation of the current GPU: 9 is Hopper."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) // 10


def unknown(chip: int) -> str:
    """Return why chips of a generation can't do it, the empty string if they can."""
    return "" if chip in LARGEST_HEAD else f"FlashAttention-4 needs a chip of generation 9 or 10 to go back, not {chip}"


def unfit(chip: int, problem: Problem) -> str:
    """Return what is wrong with a problem's heads for chips of a generation, the empty string if nothing is."""
    dims = problem.head_dim, problem.v_head_dim
    reason = unfit_heads(NAME, problem, STEP[chip], LARGEST_HEAD[chip], " on this chip")
    if reason and (chip == 9 or dims not in WIDE_HEADS):
        return reason
    if chip == 9 and dims[0] != dims[1]:  # what compiles; the library does not say
        if any(dim % 64 for dim in dims) or dims[1] > dims[0]:
            return f"FlashAttention-4 needs one head_dim, or multiples of 64 with a smaller v_head_dim, not {dims}"
        if problem.heads != problem.kv_heads:
            return "FlashAttention-4 needs as many K/V heads as query heads where v_head_dim is not head_dim"
    return ""
