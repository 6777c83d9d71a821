"""Places of a chunk's tokens among others: as indices, and as runs with even steps."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class Places:
    """Indices along the axis of the tokens, ascending.

    Attributes
    ----------
    indices : int64, (tokens,)
    """

    def __init__(self, indices: NDArray[np.int64]) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def runs(self) -> list[tuple[slice, slice]]:
        """Runs with even steps: where each lies among all tokens, and among the chunk's own."""
        result, begin = [], 0
        while begin < len(self.indices):
            steps = np.diff(self.indices[begin:])
            count = 1 if not len(steps) else 1 + int(np.argmin(np.append(steps == steps[0], False)))
            first, step = int(self.indices[begin]), int(steps[0]) if len(steps) else 1
            result.append((slice(first, first + (count - 1) * step + 1, step), slice(begin, begin + count)))
            begin += count
        return result
