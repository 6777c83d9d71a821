"""Costs of each algorithm: what a rank receives and holds, in closed form, exact for any lengths; no MPI.

- `traffic`: messages and bytes that a rank receives
- `memory`: bytes of what a rank holds; `peak`: the most at one moment
- one module for each algorithm, of its name in `algorithms`, with both: `costs` and `memory`
- `exchange`: what `ulysses` and `hybrid` have in common

All are called with the problem, the rank and the algorithm's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import (
    allgather,
    decode,
    dense,
    double_ring,
    hybrid,
    mesh,
    mesh_gathered,
    ring,
    shared_ring,
    tensor_parallel,
    ulysses,
)
from .memory import Pass
from .traffic import Costs

FORMULAS: dict[str, Any] = {
    "dense": dense,
    "ring": ring,
    "double_ring": double_ring,
    "shared_ring": shared_ring,
    "mesh": mesh,
    "mesh_gathered": mesh_gathered,
    "allgather": allgather,
    "ulysses": ulysses,
    "hybrid": hybrid,
    "tensor_parallel": tensor_parallel,
    "decode": decode,
}

COSTS: dict[str, Callable[..., Costs]] = {name: module.costs for name, module in FORMULAS.items()}
"""Function for the traffic that a rank receives, by the algorithm's name."""

AHEAD = ("ring", "hybrid")
"""Algorithms that have a buffer more for what travels where work is queued, on GPUs; see `algorithms.buffers`."""

PASSES: dict[str, Callable[..., tuple[Pass, Pass]]] = {name: module.memory for name, module in FORMULAS.items()}
"""Function for the memory that a rank holds beside its results, by the algorithm's name."""
