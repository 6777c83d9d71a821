"""Ring Attention (arXiv 2310.01889), causal, forward and backward. Start: mpiexec -n 4 python examples/ring.py.

Queries stay; at each step a rank meets the K/V of one owner, while they travel on to rank + 1 and the next ones arrive
from rank - 1. Arrays are (b, h, t, d): batch, heads, tokens of one rank (the same number on each), head_dim.
"""

import numpy as np
from mpi4py import MPI

KV, D_KV = 1, 2  # tags


def scores(q, k, ahead):
    """Return scaled scores (b, h, t, t); a query sees no later key. The first query is `ahead` of the first key."""
    return np.where(np.tri(q.shape[2], k.shape[2], ahead), q @ k.mT / np.sqrt(q.shape[3]), -np.inf)


def attention(ring, q, k, v):
    """Return out (b, h, t, d) and lse (b, h, t) of this rank's queries."""
    assert np.ptp(ring.allgather(k.shape[2])) == 0, "every rank needs the same number of tokens"
    size, rank, (source, dest) = ring.size, ring.rank, ring.Shift(0, 1)
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)  # (b, h, t, d), (b, h, t)
    kv, next_kv = np.array([k, v]), np.empty((2, *k.shape))  # (2, b, h, t, d)
    for step in range(size):
        owner = (rank - step) % size
        requests = [ring.Irecv(next_kv, source, KV), ring.Isend(kv, dest, KV)] if step + 1 < size else []
        if owner <= rank:  # the others' keys are later than these queries
            s = scores(q, kv[0], ahead=(rank - owner) * q.shape[2])  # (b, h, t, t)
            before, lse = lse, np.logaddexp(lse, np.logaddexp.reduce(s, axis=-1))
            out = np.exp(before - lse)[..., None] * out + np.exp(s - lse[..., None]) @ kv[1]
        MPI.Request.Waitall(requests)
        kv, next_kv = next_kv, kv
    return out, lse


def gradients(ring, q, k, v, out, lse, d_out):
    """Return d_q, d_k, d_v: K/V go round again, and one step behind them the sums of d_k and d_v, to end at home."""
    size, rank, (source, dest) = ring.size, ring.rank, ring.Shift(0, 1)
    d_q, delta = np.zeros_like(q), (d_out * out).sum(axis=-1)  # (b, h, t, d), (b, h, t)
    kv, next_kv, d_kv, next_d_kv = np.array([k, v]), *np.zeros((3, 2, *k.shape))  # (2, b, h, t, d)
    for step in range(size + 1):
        owner = (rank - step) % size
        requests = [ring.Irecv(next_kv, source, KV), ring.Isend(kv, dest, KV)] if step + 1 < size else []
        requests += [ring.Irecv(next_d_kv, source, D_KV), ring.Isend(d_kv, dest, D_KV)] if step > 0 else []
        mine = np.zeros_like(kv)  # this rank's part of the sum for the owner
        if step < size and owner <= rank:
            p = np.exp(scores(q, kv[0], ahead=(rank - owner) * q.shape[2]) - lse[..., None])  # (b, h, t, t)
            d_s = p * (d_out @ kv[1].mT - delta[..., None]) / np.sqrt(q.shape[3])
            d_q += d_s @ kv[0]
            mine[:] = d_s.mT @ q, p.mT @ d_out
        MPI.Request.Waitall(requests)
        kv, next_kv, d_kv = next_kv, kv, next_d_kv + mine
    return d_q, *d_kv


def dense(q, k, v, d_out):
    """Return out, d_q, d_k, d_v of the whole sequence, by the textbook."""
    p = np.exp(scores(q, k, ahead=0))
    p /= p.sum(axis=-1, keepdims=True)
    d_p = d_out @ v.mT
    d_s = p * (d_p - (p * d_p).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[3])
    return p @ v, d_s @ k, d_s.mT @ q, p.mT @ d_out


if __name__ == "__main__":
    ring = MPI.COMM_WORLD.Create_cart([MPI.COMM_WORLD.size], periods=[True])
    whole = np.random.default_rng(0).standard_normal((4, 2, 3, 8 * ring.size, 5))  # q, k, v, d_out
    q, k, v, d_out, *right = (np.split(array, ring.size, axis=2)[ring.rank] for array in (*whole, *dense(*whole)))
    out, lse = attention(ring, q, k, v)
    error = np.abs(np.array([out, *gradients(ring, q, k, v, out, lse, d_out)]) - right).max()
    owners, dest = [(ring.rank - step) % ring.size for step in range(ring.size)], ring.Shift(0, 1)[1]
    print(f"rank {ring.rank} sent rank {dest} K/V of {owners[:-1]}, twice, and dK/dV of {owners}; error {error:.0e}")
    assert error < 1e-12
