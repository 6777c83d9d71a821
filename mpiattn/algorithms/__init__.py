"""The algorithms, one file each, and their registry by name."""

from .base import Attention, Saved
from .dense import DenseAttention
from .double_ring import DoubleRingAttention
from .mesh import MeshAttention
from .ring import RingAttention
from .shared_ring import SharedRingAttention

ALGORITHMS: dict[str, type[Attention]] = {
    "dense": DenseAttention,
    "ring": RingAttention,
    "double_ring": DoubleRingAttention,
    "shared_ring": SharedRingAttention,
    "mesh": MeshAttention,
}
"""Every algorithm by the name that the command line, the tests and the planner use."""

__all__ = [
    "ALGORITHMS",
    "Attention",
    "DenseAttention",
    "DoubleRingAttention",
    "MeshAttention",
    "RingAttention",
    "Saved",
    "SharedRingAttention",
]
