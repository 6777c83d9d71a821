"""The memory that an algorithm computes in, sends from and receives into: parcels, by name, for one problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Spec
from ..arrays.operations import of
from ..arrays.softmax import LSE
from ..messages.parcel import Parcel, Uses, nbytes
from ..problems.problem import Problem


class Buffers:
    """Parcels by name: asked for again, a name has the memory that it had, until the problem changes."""

    def __init__(self) -> None:
        self.xp: ModuleType = np
        self.problem: Problem | None = None
        self.opened: list[Uses] = []
        self.held: dict[str, list[NDArray[np.uint8]]] = {}
        self.uses: dict[str, list[Uses | None]] = {}
        self.made: dict[tuple[object, ...], Parcel] = {}

    def renew(self, problem: Problem | None, xp: ModuleType, opened: list[Uses] | None = None) -> None:
        """Give back all memory, and have it for another problem of arrays of that namespace from now on.

        `opened` is `Channel.opened`, where messages go between GPUs.
        """
        self.problem, self.xp = problem, xp
        self.opened = [] if opened is None else opened
        for parcel in self.made.values():
            parcel.release()  # an algorithm may still hold it
        for kept in (self.held, self.uses, self.made):
            kept.clear()

    def parcels(self, name: str, specs: Sequence[Sequence[Spec]], buffers: int = 0, anew: bool = False) -> list[Parcel]:
        """Return a parcel for each list of specs.

        Parameters
        ----------
        name : str
        specs : for each parcel, shapes and dtypes
        buffers : int
            Parcel s lives in buffer s % buffers; with 0 each has a buffer of its own.
        anew : bool
            Whether the algorithm asks for `parcel.arrays` again before each call of the kernel. On GPUs, where work is
            queued, a message then waits only for work on its own parcel's buffer, and there is one buffer more, so that
            messages run ahead of the queue.
        """
        tracked = anew and of(self.xp).QUEUED
        count = min(buffers + (tracked and buffers > 0), len(specs)) or len(specs)
        if name not in self.held:
            sizes = [max(nbytes(group) for group in _different(specs[start::count])) for start in range(count)]
            self.held[name] = [self.xp.empty(size, np.uint8) for size in sizes]
            self.uses[name] = [Uses(self.opened) if tracked else None for _ in range(count)]
        # Most chunks are of one shape: their parcels in one buffer are one.
        result: list[Parcel] = []
        for step, group in enumerate(specs):
            if step >= count and result[step - count].specs == group:
                result.append(result[step - count])
                continue
            key = name, step % count, *group
            if key not in self.made:
                self.made[key] = Parcel(group, self.held[name][step % count], self.uses[name][step % count])
            result.append(self.made[key])
        return result

    def sums(self, name: str, specs: Sequence[list[Spec]], buffers: int = 0, anew: bool = False) -> list[Parcel]:
        """Return parcels of partial sums; where partials are narrow, each has a second one to travel in, rounded."""
        sums, travelling = self.parcels(name, specs, buffers, anew), self.travelling(specs)
        if travelling != list(specs):
            for own, rounded in zip(sums, self.parcels(f"rounded {name}", travelling, buffers, anew), strict=True):
                own.sent_as = rounded
        return sums

    def arriving(self, name: str, specs: Sequence[list[Spec]]) -> list[Parcel]:
        """Return parcels for sums that arrive, one a step in one buffer.

        Number 0 is the rank's own sum, which comes home; it has a buffer to itself, as it may arrive together with the
        last of the others.
        """
        specs = self.travelling(specs)
        return self.parcels(f"home {name}", specs[:1]) + self.parcels(f"arriving {name}", specs, buffers=1)[1:]

    def travelling(self, specs: Sequence[list[Spec]]) -> list[list[Spec]]:
        """Return partial sums as they travel; see `Problem.sent`."""
        assert self.problem is not None
        return [self.problem.sent(sums) for sums in specs]

    def state(self, q: Array) -> tuple[Array, Array]:
        """Return new (out, lse) of queries that have attended to nothing: zeros and -inf."""
        (shape, wide), (rows, dtype) = self._state(q)
        return self.xp.zeros(shape, wide), self.xp.full(rows, -math.inf, dtype)

    def unwritten_state(self, q: Array) -> tuple[Array, Array]:
        """Return new memory for the (out, lse) of queries, which a kernel is to begin."""
        out, lse = (self.xp.empty(*spec) for spec in self._state(q))
        return out, lse

    def _state(self, q: Array) -> tuple[Spec, Spec]:
        assert self.problem is not None
        return ((*q.shape[:3], self.problem.v_head_dim), self.problem.wide), (q.shape[:3], LSE)


def _different(specs: Sequence[Sequence[Spec]]) -> list[Sequence[Spec]]:
    """Return the lists of specs, without each that equals the list before it."""
    return [group for number, group in enumerate(specs) if not number or group != specs[number - 1]]
