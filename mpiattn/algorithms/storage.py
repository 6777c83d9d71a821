"""The memory that an algorithm computes in, sends from and receives into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Spec
from ..arrays.softmax import LSE
from ..messages.parcel import Parcel, Uses, nbytes
from ..problems.problem import Problem


class Storage:
    """Parcels by name, for one problem at a time."""

    def __init__(self) -> None:
        self.xp: Any = np
        """Namespace of the arrays at hand: NumPy, CuPy, ..."""
        self.problem: Problem | None = None
        self.storage: dict[str, list[NDArray[np.uint8]]] = {}
        self.uses: dict[str, list[Uses | None]] = {}
        self.made: dict[tuple[Any, ...], dict[int, Parcel]] = {}

    def parcels(self, name: str, specs: Sequence[Sequence[Spec]], buffers: int = 0, anew: bool = False) -> list[Parcel]:
        """Return a parcel for each list of specs; they keep their storage until the problem changes.

        Parcel s lives in buffer s % buffers; with 0 each has a buffer of its own. `anew` says that a parcel's
        arrays are asked for anew before each kernel call. On GPUs, which do what is queued, its messages then
        wait only for what is queued on its own buffer; and one more buffer lets them run ahead of the queue.
        """
        tracked = anew and self.xp.__name__ == "cupy"
        count = min(buffers + (tracked and buffers > 0), len(specs)) or len(specs)
        if name not in self.storage:
            self.uses[name] = [Uses() if tracked else None for _ in range(count)]
            different = [{id(group): group for group in specs[start::count]} for start in range(count)]
            largest = [max(map(nbytes, groups.values())) for groups in different]
            self.storage[name] = [self.xp.empty(size, np.uint8) for size in largest]
        # Chunks of one shape in one buffer are one parcel. Most share one list, which is then looked at once.
        alike = {id(group): group for group in specs}
        made = {number: self.made.setdefault((name, *group), {}) for number, group in alike.items()}
        result = []
        for step, group in enumerate(specs):
            known, place = made[id(group)], step % count
            if place not in known:
                known[place] = Parcel(group, self.storage[name][place], self.uses[name][place])
            result.append(known[place])
        return result

    def sums(self, name: str, specs: Sequence[list[Spec]], buffers: int = 0, anew: bool = False) -> list[Parcel]:
        """Return parcels of partial sums: as `parcels`, but each may travel as another, which is rounded."""
        sums = self.parcels(name, specs, buffers, anew)
        travelling = self.travelling(specs)
        if travelling != list(specs):
            for own, rounded in zip(sums, self.parcels(f"rounded {name}", travelling, buffers, anew), strict=True):
                own.sent_as = rounded
        return sums

    def arriving(self, name: str, specs: Sequence[list[Spec]]) -> list[Parcel]:
        """Return parcels for sums that arrive one a step; the own one, number 0, may arrive beside another."""
        specs = self.travelling(specs)
        return self.parcels(f"home {name}", specs[:1]) + self.parcels(f"arriving {name}", specs, buffers=1)[1:]

    def travelling(self, specs: Sequence[list[Spec]]) -> list[list[Spec]]:
        """Return partial sums as they travel; see `Problem.sent`."""
        assert self.problem is not None
        return [self.problem.sent(sums) for sums in specs]

    def state(self, problem: Problem, q: Array) -> tuple[Array, Array]:
        """Return the (out, lse) of some queries that have attended to nothing."""
        out = self.xp.zeros((*q.shape[:3], problem.v_head_dim), problem.wide)
        return out, self.xp.full(q.shape[:3], -math.inf, LSE)
