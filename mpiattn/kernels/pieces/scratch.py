"""Memory that serves all calls of a kernel in turn: they run one after the other on one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

Array = Any


class Scratch:
    """Buffers of bytes by name; each is as large as the largest that was asked for."""

    def __init__(self) -> None:
        self.work: dict[str, Array] = {}

    def rounded(self, rows: Array) -> int:
        """Return a pointer to a copy of lse in float32, without gaps."""
        self.work["lse"] = rows.astype(cupy.float32, order="C")
        return int(self.work["lse"].data.ptr)

    def buffers(self, sizes: Sequence[int], name: str = "") -> list[int]:
        """Return pointers to memory of these sizes."""
        result = []
        for number, size in enumerate(sizes):
            key = f"{name}{number}"
            held = self.work.get(key)
            if held is None or held.nbytes < size:
                held = self.work[key] = cupy.empty(max(size, 1), np.uint8)
            result.append(held.data.ptr)
        return result
