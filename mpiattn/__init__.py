"""Exact distributed attention over MPI, forward and backward, in which every message can be read."""

from .algorithms import ALGORITHMS, DenseAttention, DoubleRingAttention, MeshAttention, RingAttention
from .layout import gather, scatter
from .mask import Causal, Documents, Full, SlidingWindow

__all__ = [
    "ALGORITHMS",
    "Causal",
    "DenseAttention",
    "Documents",
    "DoubleRingAttention",
    "Full",
    "MeshAttention",
    "RingAttention",
    "SlidingWindow",
    "gather",
    "scatter",
]
