"""Exact distributed attention over MPI, forward and backward, in which every message can be read.

    with mpiattn.MeshAttention(comm, mask=mpiattn.Causal()) as attention:
        out, saved = attention.forward(q, k, v)
        d_q, d_k, d_v = attention.backward(d_out, saved)

- `Attention` says what all algorithms have in common; `ALGORITHMS` has them by name
- `Full`, `Causal`, `SlidingWindow`, `Documents`: masks, joined by `&`; `Mask`, for masks of your own
- `Dropout`: for `forward`
- `scatter`, `gather`: whole arrays of one rank, and the shares of all
- `auto`, `choose`: the algorithm and the grid that suit a problem and a cluster
- `InputError`: what every rank raises where input is bad

- `use_gpu`: one of the host's GPUs for this rank, and CuPy
- `watch`: who waits for whom when the ranks are stuck, instead of a job that hangs

Further in: `costs`, the bytes received and held; `trace`, what went over a
communicator; `planner`, for clusters that aren't at hand; `virtual`, ranks without MPI.
"""

from .algorithms import (
    ALGORITHMS,
    AllGatherAttention,
    Attention,
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
from .algorithms.shares import gather, scatter
from .errors import InputError
from .messages.hosts import use_gpu
from .planner import auto, choose
from .problems.dropout import Dropout
from .problems.mask import Causal, Documents, Full, Mask, SlidingWindow
from .trace.watch.session import watch

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "AllGatherAttention",
    "Attention",
    "Causal",
    "DecodeAttention",
    "DenseAttention",
    "Documents",
    "DoubleRingAttention",
    "Dropout",
    "Full",
    "GatheredMeshAttention",
    "HybridAttention",
    "InputError",
    "Mask",
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
    "use_gpu",
    "watch",
]
