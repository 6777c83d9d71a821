"""The algorithms, one file each, and their registry by name."""

from .base import Attention, Saved
from .dense import DenseAttention
from .mesh import MeshAttention
from .ring import RingAttention

ALGORITHMS: dict[str, type[Attention]] = {
    "dense": DenseAttention,
    "ring": RingAttention,
    "mesh": MeshAttention,
}
"""Every algorithm by the name that the command line, the tests and the planner use."""

__all__ = ["ALGORITHMS", "Attention", "DenseAttention", "MeshAttention", "RingAttention", "Saved"]
