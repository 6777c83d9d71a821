"""How sums begin and end that a kernel adds to: at once, or when all that waits for them is there.

`begin` says that sums hold nothing yet; the kernel's calls add to them, or merge into them; then `settle` or
`complete` is called once, before they are sent or used. A kernel that computes its shares in memory of its own may
let them wait until then, and add them up in one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..arrays import add
from ..arrays.softmax import merge
from ..messages.parcel import Parcel

Array = Any


class Sums:
    """Sums to which each call of the kernel adds at once."""

    rounds = True
    """Whether complete sums may be rounded: nothing is added to them elsewhere."""

    def remember(self, row_delta: Array, out: Array) -> None:
        """Say of which output row_delta has the sums of products with d_out: a kernel may rather use that."""

    def begin(self, *sums: Array) -> None:
        """Let sums hold nothing: zeros, and -inf in the lse of (out, lse)."""
        for array in sums:
            array.fill(-math.inf if array.ndim == 3 else 0)

    def settle(self, sums: Parcel, *arrived: Sequence[Array]) -> None:
        """Let a parcel that is to be sent hold all that was added to it, and beside that the sums that arrived."""
        self.complete(sums.arrays, *arrived)

    def complete(self, sums: Sequence[Array], *arrived: Sequence[Array]) -> Sequence[Array]:
        """Return complete sums; they may be new arrays, of the inputs' dtype."""
        for shares in arrived:
            if sums[-1].ndim == 3:  # lse
                merge(*sums, *shares)
            else:
                for total, share in zip(sums, shares, strict=True):
                    add(total, share)
        return sums
