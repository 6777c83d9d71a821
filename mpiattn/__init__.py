"""Exact distributed attention over MPI, forward and backward, in which every message can be read."""

from .algorithms import (
    ALGORITHMS,
    AllGatherAttention,
    DecodeAttention,
    DenseAttention,
    DoubleRingAttention,
    GatheredMeshAttention,
    HybridAttention,
    MeshAttention,
    RingAttention,
    SharedRingAttention,
    TensorParallelAttention,
    UlyssesAttention,
)
from .dropout import Dropout
from .mask import Causal, Documents, Full, SlidingWindow
from .planner import auto, choose
from .shares import gather, scatter

__all__ = [
    "ALGORITHMS",
    "AllGatherAttention",
    "Causal",
    "DecodeAttention",
    "DenseAttention",
    "Documents",
    "DoubleRingAttention",
    "Dropout",
    "Full",
    "GatheredMeshAttention",
    "HybridAttention",
    "MeshAttention",
    "RingAttention",
    "SharedRingAttention",
    "SlidingWindow",
    "TensorParallelAttention",
    "UlyssesAttention",
    "auto",
    "choose",
    "gather",
    "scatter",
]
