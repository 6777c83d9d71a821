"""The task that is planned for: attention of a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .. import arrays
from ..algorithms.options import check_mask, check_partials
from ..errors import InputError
from ..problems import layout
from ..problems.mask import Full, Mask
from ..problems.problem import Problem
from ..problems.scalars import whole
from ..problems.user_mask import UserMask, held

MOST = 2**31 - 1
"""The largest size of any kind: the positions of so many tokens take 16 GiB."""


@dataclass(frozen=True)
class Task:
    """Attention of a whole sequence.

    Attributes
    ----------
    tokens, heads, kv_heads, head_dim, batch : int
    dtype : str
    mask : Mask
    backward : bool
        Whether to plan for forward and backward together.
    layout : str, optional
        The algorithms' own default if not given.
    kv_tokens, v_head_dim : int, optional
        The same as the queries' if not given.
    partials : {"wide", "narrow"}
        How partial sums travel; see `Attention`.

    Raises
    ------
    InputError
        Where they make no sense: says what would.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    mask: Mask = field(default_factory=Full)
    backward: bool = True
    layout: str | None = None
    kv_tokens: int | None = None
    v_head_dim: int | None = None
    partials: str = "wide"

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "kv_heads", "head_dim", "batch", "kv_tokens", "v_head_dim"):
            value = getattr(self, name)
            if value is None and name in ("kv_tokens", "v_head_dim"):
                continue
            number = whole(value)
            if number is None or number < 1:
                raise InputError(f"{name} must be a whole number, 1 or more, got {value!r}")
            if number > MOST:
                raise InputError(f"{name} is at most {MOST} for a plan, which goes through all positions, got {number}")
            object.__setattr__(self, name, number)
        if self.heads % self.kv_heads:
            legal = [heads for heads in range(1, min(self.heads, 4096) + 1) if self.heads % heads == 0]
            raise InputError(f"{self.heads} heads can't share {self.kv_heads} K/V heads: choose one of {legal}")
        try:
            object.__setattr__(self, "dtype", arrays.dtype(self.dtype).name)
            if self.layout is not None:
                layout.check(self.layout)
            check_partials(self.partials)
            check_mask(self.mask)
            if isinstance(mask := held(self.mask), UserMask):
                mask = mask.tabulated(np.arange(self.tokens), self.tokens, self.kv_tokens or self.tokens)
                object.__setattr__(self, "mask", mask)
            self.mask.check(self.tokens, self.kv_tokens or self.tokens)
        except ValueError as error:
            raise InputError(str(error)) from None

    def problem(self, ranks: int) -> Problem:
        """Return the problem that it poses to so many ranks."""
        kind = self.layout or layout.default(self.mask)
        return Problem(
            ranks, self.batch, self.heads, self.kv_heads, self.head_dim, self.v_head_dim or self.head_dim,
            self.tokens, self.kv_tokens or self.tokens, arrays.dtype(self.dtype), layout.check(kind), self.mask,
            partials=self.partials,
        )  # fmt: skip
