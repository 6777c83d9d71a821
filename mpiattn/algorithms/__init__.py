"""The algorithms, one file each, and their registry by name."""

from .allgather import AllGatherAttention
from .base import Attention
from .decode import DecodeAttention
from .dense import DenseAttention
from .double_ring import DoubleRingAttention
from .hybrid import HybridAttention
from .mesh import MeshAttention
from .mesh_gathered import GatheredMeshAttention
from .ring import RingAttention
from .saved import Saved
from .shared_ring import SharedRingAttention
from .tensor_parallel import TensorParallelAttention
from .ulysses import UlyssesAttention

ALGORITHMS: dict[str, type[Attention]] = {
    "dense": DenseAttention,
    "ring": RingAttention,
    "double_ring": DoubleRingAttention,
    "shared_ring": SharedRingAttention,
    "mesh": MeshAttention,
    "mesh_gathered": GatheredMeshAttention,
    "allgather": AllGatherAttention,
    "ulysses": UlyssesAttention,
    "hybrid": HybridAttention,
    "tensor_parallel": TensorParallelAttention,
    "decode": DecodeAttention,
}
"""Every algorithm by the name that the command line, the tests and the planner use."""

__all__ = [
    "ALGORITHMS",
    "AllGatherAttention",
    "Attention",
    "DecodeAttention",
    "DenseAttention",
    "DoubleRingAttention",
    "GatheredMeshAttention",
    "HybridAttention",
    "MeshAttention",
    "RingAttention",
    "Saved",
    "SharedRingAttention",
    "TensorParallelAttention",
    "UlyssesAttention",
]
