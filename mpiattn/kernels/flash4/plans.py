"""FlashAttention-4's plans: the kernels of one shape, found once and queued for each piece of that shape."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpiattn.arrays.cupy.place import Place

from . import memory
from .launches import Launch, written_down
from .library import loaded
from .memory import Layout

if TYPE_CHECKING:
    from ..pieces.scratch import Scratch

KEPT = 64
"""Addresses of an array whose tensors a plan keeps: CuPy's pool gives out the same ones again and again."""


class Plan:
    """Launches, with room for the addresses of other arrays.

    Parameters
    ----------
    launches : sequence of Launch
        Written down with stand-ins.
    given : sequence of tensors
        The stand-ins, in the order of the pointers to come. Other tensors in the launches are the library's scratch.
    device : int
    """

    def __init__(self, launches: Sequence[Launch], given: Sequence[memory.Tensor], device: int) -> None:
        self.device, self.calls = device, []
        self.layouts = [layout for layout in map(memory.layout_of, given) if layout is not None]
        numbers = {memory.identity(tensor): number for number, tensor in enumerate(given)}
        self.cleared: list[int] = []
        for order, (function, arguments) in enumerate(launches):
            places: list[tuple[int, int]] = []
            for position, argument in enumerate(arguments):
                layout = memory.layout_of(argument)
                if layout is not None:
                    number = numbers.setdefault(memory.identity(argument), len(self.layouts))
                    if number == len(self.layouts):
                        self.layouts.append(layout)
                        # The first of several launches writes all the scratch it has; any other is added to.
                        if order or len(launches) == 1:
                            self.cleared.append(number)
                    places.append((position, number))
            self.calls.append((function, list(arguments), places))
        self.sizes = [layout.nbytes for layout in self.layouts[len(given) :]]
        self.known: list[dict[int, memory.Tensor]] = [{} for _ in self.layouts]

    def __call__(self, scratch: Scratch, *pointers: int) -> None:
        """Queue the work on the current stream; pointers in the order of the stand-ins."""
        pointers = (*pointers, *scratch.buffers(self.sizes, "flash4 "))
        stream = memory.current_stream()
        for number in self.cleared:
            memory.clear(pointers[number], self.layouts[number].nbytes, stream)
        tensors = [self._tensor(number, pointer) for number, pointer in enumerate(pointers)]
        with memory.queueing(self.device, stream):
            for function, arguments, places in self.calls:
                for position, number in places:
                    arguments[position] = tensors[number]
                function(*arguments)

    def _tensor(self, number: int, pointer: int) -> memory.Tensor:
        known = self.known[number]
        if pointer not in known:
            if len(known) >= KEPT:
                known.clear()
            known[pointer] = memory.at(pointer, self.layouts[number], self.device)
        return known[pointer]


@functools.cache
def build(
    device: int, dtype: str, scale: float, causal: bool, left: int | None, *places: Place, deterministic: bool = False
) -> Plan | None:
    """Return the plan for q, k, v (forward), or for q, k, v, d_out, out (backward); None where there is none."""
    interface, _ = loaded()
    q, k, v, *rows = places
    packed = [Place.packed(place.shape, np.float16) for place in (q, k, v)]
    out, lse = Place.packed((*q.shape[:3], v.shape[3]), np.float16), Place.packed(q.shape[:3], np.float32)
    given = [q, k, v, *reversed(rows), lse, *packed] if rows else [q, k, v, out, lse]  # as the pointers come
    options: dict[str, Any] = {"softmax_scale": scale, **mask(causal, left, q.shape[2], k.shape[2])}
    try:
        with written_down(interface) as launches, memory.without_memory():
            tensors = [memory.stand_in(Layout.of(place, "float32" if place is lse else dtype)) for place in given]
            if rows:
                d_q, d_k, d_v = tensors[6:]
                options["deterministic"] = deterministic
                call = functools.partial(interface._flash_attn_bwd, *tensors[:6], **options, dq=d_q, dk=d_k, dv=d_v)
            else:
                call = functools.partial(
                    interface._flash_attn_fwd, *tensors[:3], **options, out=tensors[3], lse=tensors[4]
                )
            memory.collecting_warnings(call)
    except Exception as error:
        warnings.warn(f"FlashAttention-4 can't do {q.shape}, {v.shape}: {error}; CuPy's kernel does", stacklevel=2)
        return None
    return Plan(launches, tensors, device)


def mask(causal: bool, left: int | None, queries: int, keys: int) -> dict[str, bool | int | None]:
    """Return the library's words for a piece's mask; its windows lie about the diagonal that ends at the last key."""
    if causal and left is not None:
        return {"causal": False, "window_size_left": left - 1, "window_size_right": 0}
    return {"causal": causal, "window_size_left": None if left is None else keys - queries, "window_size_right": None}
