"""Sums to which each call of a kernel adds at once; see `contract` for the order of calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..arrays import Array
from ..arrays.operations import operations
from ..arrays.softmax import merge
from ..messages.parcel import Parcel


class Sums:
    """Methods on sums for a kernel that adds its shares at once."""

    def remember(self, delta: Array, out: Array) -> None:
        """Do nothing: delta is what is used."""

    def begin(self, *sums: Array) -> None:
        """Let sums hold nothing: zeros, and -inf in the lse of (out, lse)."""
        for array in sums:
            array.fill(-math.inf if array.ndim == 3 else 0)

    def settle(self, sums: Parcel, *arrived: Sequence[Array]) -> None:
        """Add the sums that arrived."""
        self.complete(sums.arrays, *arrived)

    def complete(self, sums: Sequence[Array], *arrived: Sequence[Array]) -> Sequence[Array]:
        """Add the sums that arrived, and return them all together."""
        for shares in arrived:
            if sums[-1].ndim == 3:  # lse
                merge(*sums, *shares)
            else:
                add = operations(sums[-1]).add
                for total, share in zip(sums, shares, strict=True):
                    add(total, share)
        return sums
