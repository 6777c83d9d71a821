"""Mesh-Attention (arXiv 2512.20968), causal, forward and backward. Start: mpiexec -n 6 python examples/mesh.py.

The ranks form a grid; rank (r, c) has number r * cols + c. Queries travel along rows, keys and values down columns, so
that each rank computes a tile of cols x rows blocks. With 2 x 3 ranks, the blocks of queries and keys are computed by

              K/V 0   K/V 1   K/V 2   K/V 3   K/V 4   K/V 5
    Q 0..2    (0, 0)  (0, 1)  (0, 2)  (0, 0)  (0, 1)  (0, 2)
    Q 3..5    (1, 0)  (1, 1)  (1, 2)  (1, 0)  (1, 1)  (1, 2)

In slot j of a rank are the queries that have come j columns far, those of column c - j; in slot i the K/V of row r - i.
Arrays are (b, h, t, d): batch, heads, tokens of one rank (the same number on each), head_dim.
"""

from enum import IntEnum

import numpy as np
from mpi4py import MPI

Tag = IntEnum("Tag", "Q KV OUT D_Q D_KV")
sent = []  # what this rank has sent, and to which rank of all


def scores(q, k, ahead):
    """Return scaled scores (b, h, t, t); a query sees no later key. The first query is `ahead` of the first key."""
    return np.where(np.tri(q.shape[2], k.shape[2], ahead), q @ k.mT / np.sqrt(q.shape[3]), -np.inf)


def hop(ring, leaving, arriving, tag):
    """Post one hop along a row or down a column: an array for the next rank, and one from the rank before."""
    source, dest = ring.Shift(0, 1)
    sent.append(f"{tag.name} to {ring.group.Translate_ranks([dest], MPI.COMM_WORLD.group)[0]}")
    return [ring.Irecv(arriving, source, tag), ring.Isend(leaving, dest, tag)]


def bring_home(ring, sums, tag, join):
    """Return this rank's own sum: each sum starts one rank after its owner, and every rank on its way adds a share."""
    share = np.empty_like(sums[0])
    for slot in range(1, ring.size):
        MPI.Request.Waitall(hop(ring, sums[slot], share, tag))
        onward = (slot + 1) % ring.size  # after the last slot comes slot 0: the rank's own
        sums[onward] = join(sums[onward], share)
    return sums[0]


def block(q, k, v, ahead):
    """Return out and, as one more column, lse of one block: (b, h, t, d + 1)."""
    s = scores(q, k, ahead)  # (b, h, t, t)
    lse = np.logaddexp.reduce(s, axis=-1, keepdims=True)  # (b, h, t, 1)
    return np.concatenate([np.exp(s - lse) @ v, lse], axis=-1)


def merge(one, other):
    """Return out and lse (b, h, t, d + 1) over the keys of both."""
    lse = np.logaddexp(one[..., -1:], other[..., -1:])
    out = sum(np.exp(part[..., -1:] - lse) * part[..., :-1] for part in (one, other))
    return np.concatenate([out, lse], axis=-1)


def attention(row, col, q, k, v):
    """Return out (b, h, t, d) and lse (b, h, t) of this rank's queries.

    K/V go down the column, once for each i; queries go along the row while i is 0; outputs return along it at the end.
    """
    assert np.ptp(row.allgather(col.allgather(k.shape[2]))) == 0, "every rank needs the same number of tokens"
    (c, cols), (r, rows), (*bht, d) = (row.rank, row.size), (col.rank, col.size), q.shape
    qs, sums = np.empty((cols, *q.shape)), np.zeros((cols, *bht, d + 1))  # a slot each: queries, their out and lse
    qs[0], sums[..., -1] = q, -1e300  # lse of no keys; -inf would make merge() subtract inf from inf
    kv, next_kv = np.array([k, v]), np.empty((2, *k.shape))  # (2, b, h, t, d)
    for i in range(rows):
        kv_requests = hop(col, kv, next_kv, Tag.KV) if i + 1 < rows else []
        for j in range(cols):
            q_requests = hop(row, qs[j], qs[j + 1], Tag.Q) if i == 0 and j + 1 < cols else []
            q_owner, kv_owner = r * cols + (c - j) % cols, (r - i) % rows * cols + c
            if kv_owner <= q_owner:
                sums[j] = merge(sums[j], block(qs[j], *kv, ahead=(q_owner - kv_owner) * q.shape[2]))
            MPI.Request.Waitall(q_requests)
        MPI.Request.Waitall(kv_requests)
        kv, next_kv = next_kv, kv
    total = bring_home(row, sums, Tag.OUT, merge)
    return total[..., :-1], total[..., -1]


def gradients(row, col, q, k, v, out, lse, d_out):
    """Return d_q, d_k, d_v (b, h, t, d): what belongs to queries travels with them; sums come home along both ways."""
    (c, cols), (r, rows), (*bht, d) = (row.rank, row.size), (col.rank, col.size), q.shape
    delta = (d_out * out).sum(axis=-1)  # (b, h, t)
    qs, d_qs, d_kvs = np.empty((cols, *bht, 2 * d + 2)), np.zeros((cols, *q.shape)), np.zeros((rows, 2, *k.shape))
    qs[0] = np.concatenate([q, d_out, lse[..., None], delta[..., None]], axis=-1)
    kv, next_kv = np.array([k, v]), np.empty((2, *k.shape))  # (2, b, h, t, d)
    for i in range(rows):
        kv_requests = hop(col, kv, next_kv, Tag.KV) if i + 1 < rows else []
        for j in range(cols):
            q_requests = hop(row, qs[j], qs[j + 1], Tag.Q) if i == 0 and j + 1 < cols else []
            q_owner, kv_owner = r * cols + (c - j) % cols, (r - i) % rows * cols + c
            if kv_owner <= q_owner:
                q, d_out, lse, delta = np.split(qs[j], [d, 2 * d, 2 * d + 1], axis=-1)  # (b, h, t, d or 1)
                p = np.exp(scores(q, kv[0], ahead=(q_owner - kv_owner) * q.shape[2]) - lse)  # (b, h, t, t)
                d_s = p * (d_out @ kv[1].mT - delta) / np.sqrt(d)
                d_qs[j] += d_s @ kv[0]
                d_kvs[i] += d_s.mT @ q, p.mT @ d_out
            MPI.Request.Waitall(q_requests)
        MPI.Request.Waitall(kv_requests)
        kv, next_kv = next_kv, kv
    return bring_home(row, d_qs, Tag.D_Q, np.add), *bring_home(col, d_kvs, Tag.D_KV, np.add)


def dense(q, k, v, d_out):
    """Return out, d_q, d_k, d_v of the whole sequence, by the textbook."""
    p = np.exp(scores(q, k, ahead=0))
    p /= p.sum(axis=-1, keepdims=True)
    d_p = d_out @ v.mT
    d_s = p * (d_p - (p * d_p).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[3])
    return p @ v, d_s @ k, d_s.mT @ q, p.mT @ d_out


if __name__ == "__main__":
    size = MPI.COMM_WORLD.size
    grid = MPI.COMM_WORLD.Create_cart(sorted(MPI.Compute_dims(size, 2)), periods=[True, True])  # rows, cols
    row, col = grid.Sub([False, True]), grid.Sub([True, False])  # the ranks that share queries; those that share K/V
    whole = np.random.default_rng(0).standard_normal((4, 2, 3, 8 * size, 5))  # q, k, v, d_out
    q, k, v, d_out, *right = (np.split(array, size, axis=2)[grid.rank] for array in (*whole, *dense(*whole)))
    out, lse = attention(row, col, q, k, v)
    error = np.abs(np.array([out, *gradients(row, col, q, k, v, out, lse, d_out)]) - right).max()
    print(f"rank {grid.rank} {tuple(grid.coords)} sent {', '.join(sent)}; error {error:.0e}")
    assert error < 1e-12
