"""The most memory that an algorithm holds while it runs, beside what it was given, and without its kernel's tiles."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...arrays.operations import of
from ...trace.events import Trace


@dataclass
class Held:
    """Largest memory held, in bytes.

    Attributes
    ----------
    bytes : int
        On CPUs all that Python holds, the kernel's tiles too; on GPUs what the algorithm holds.
    workspace : int
        What the kernel holds at most on a GPU, in calls and for sums that wait.
    """

    bytes: int = 0
    workspace: int = 0


@contextmanager
def held(xp: ModuleType, trace: Trace) -> Iterator[Held]:
    """Measure what is held in the block; `trace` records the kernel's calls."""
    result = Held()
    if not of(xp).QUEUED:
        tracemalloc.start()
        yield result
        result.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return
    with on_gpu(trace) as counted:
        yield result
    result.bytes, result.workspace = counted.most


def on_gpu(trace: Trace) -> Any:
    """Return a hook of CuPy's pool that counts bytes in use, those apart that a kernel's call takes."""
    import cupy

    class Counted(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "held"

        def __init__(self) -> None:
            self.sizes: dict[int, tuple[int, int]] = {}  # by address: 1 for the kernel's, and bytes
            self.now, self.most = [0, 0], [0, 0]

        def malloc_postprocess(self, *, size: int, mem_ptr: int, **others: object) -> None:
            """Count what is taken."""
            last = trace.events[-1] if trace.events else None
            whose = int(last is not None and last.kind == "compute" and last.end != last.end)  # not yet at its end
            self.sizes[mem_ptr] = whose, size
            self.now[whose] += size
            self.most[whose] = max(self.most[whose], self.now[whose])

        def free_postprocess(self, *, mem_ptr: int, **others: object) -> None:
            """Count what is given back; what was there before the block is not counted."""
            whose, size = self.sizes.pop(mem_ptr, (0, 0))
            self.now[whose] -= size

    return Counted()
