"""examples/ring.py as an implementation that `mpiattn conformance` judges: what it takes, and what it refuses.

From this folder:

    mpiexec -n 3 mpiattn conformance --module foreign_ring:attention --layout contiguous --mask causal --tokens 12,48
"""

from types import SimpleNamespace

import numpy as np
import ring


class attention:
    """Causal Ring Attention of contiguous tokens, the same number on each rank."""

    def __init__(self, comm, layout, mask, scale):
        if layout != "contiguous" or str(mask) != "causal" or scale is not None:
            raise NotImplementedError("it takes contiguous tokens, a causal mask, and no scale")
        self.ring = comm.Create_cart([comm.size], periods=[True])

    def forward(self, q, k, v):
        """Return out, and what `backward` needs; all arrays are (batch, heads, tokens, head_dim)."""
        shapes = self.ring.allgather((q.shape[2:], k.shape[2:], v.shape[2:]))  # so that all ranks refuse, or none
        if len(set(sum(shapes, ()))) > 1 or q.dtype != "float64":
            raise NotImplementedError("q, k, v must be float64, of the same tokens and head_dim on all ranks")
        group = q.shape[1] // k.shape[1]  # query heads of a K/V head
        k, v = (np.repeat(array, group, axis=1) for array in (k, v))
        out, lse = ring.attention(self.ring, q, k, v)
        return out, SimpleNamespace(q=q, k=k, v=v, out=out, lse=lse, group=group)

    def backward(self, d_out, saved):
        """Return d_q, d_k, d_v; those of a K/V head are the sums of its query heads'."""
        d_q, *d_kv = ring.gradients(self.ring, saved.q, saved.k, saved.v, saved.out, saved.lse, d_out)
        return d_q, *(np.add.reduceat(array, range(0, d_q.shape[1], saved.group), axis=1) for array in d_kv)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if exception[0] is None:
            self.ring.Free()
