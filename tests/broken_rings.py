"""Ring Attention on plain arrays and mpi4py, right but for one mistake each, for `mpiattn conformance` to find.

`--module broken_rings:stale`, for example, from this folder. `sound` has no mistake.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiattn.problems.layout import positions
from mpiattn.problems.mask import Mask, allowed


class Ring:
    """Ring Attention with as many K/V heads as query heads; `mistake` says which one it makes."""

    def __init__(self, comm: MPI.Intracomm, layout: str, mask: Mask, scale: float | None, mistake: str = "") -> None:
        self.comm = comm.Create_cart([comm.size], periods=[True])
        self.layout, self.mask, self.scale, self.mistake = layout, mask, scale, mistake

    def forward(self, q: Any, k: Any, v: Any) -> tuple[Any, SimpleNamespace]:
        if q.shape[1] != k.shape[1] or q.shape[3] != v.shape[3]:
            raise NotImplementedError("as many K/V heads as query heads, and one head_dim")
        tokens = self.comm.allgather((q.shape[2], k.shape[2]))
        totals = np.sum(tokens, axis=0)
        self.queries, self.keys = (
            [positions(self.layout, int(total), self.comm.size, rank) for rank in range(self.comm.size)]
            for total in totals
        )
        self.factor = q.shape[3] ** -0.5 if self.scale is None else self.scale
        out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
        for step, (owner, near_k, near_v) in enumerate(self.round(k, v)):
            if self.mistake == "left_out" and step == 1:
                continue
            s = self.scores(q, near_k, owner)
            for _ in range(2 if self.mistake == "twice" and step == 1 else 1):
                with np.errstate(all="ignore"):
                    block = np.logaddexp.reduce(s, axis=-1)
                    part = np.nan_to_num(np.exp(s - block[..., None])) @ near_v
                    before, lse = lse, np.logaddexp(lse, block)
                    if self.mistake == "normalised":
                        out = out + part / self.comm.size
                    else:
                        weights = [np.nan_to_num(np.exp(one - lse))[..., None] for one in (before, block)]
                        out = weights[0] * out + weights[1] * part
        return out.astype(q.dtype), SimpleNamespace(q=q, k=k, v=v, out=out, lse=lse)

    def backward(self, d_out: Any, saved: SimpleNamespace) -> tuple[Any, Any, Any]:
        q, k, v = (array.astype(np.float64) for array in (saved.q, saved.k, saved.v))
        if self.mistake == "raises" and self.comm.rank == 1:
            raise IndexError("no such row")
        if self.mistake == "hangs" and self.comm.rank == 1:
            time.sleep(1000)
        delta, d_q = (d_out * saved.out).sum(axis=-1), np.zeros(q.shape)
        lse = np.where(np.isneginf(saved.lse), 0, saved.lse)[..., None]
        sums = {owner: np.zeros((2, *self.shape(k, owner))) for owner in range(self.comm.size)}
        before = k, v
        for step, (owner, *near) in enumerate(self.round(k, v)):
            if self.mistake == "stale":
                near, before = list(before), tuple(near)
            p = np.exp(self.scores(q, near[0], owner) - lse)
            d_s = p * (d_out @ near[1].mT - delta[..., None]) * self.factor
            d_q += d_s @ near[0]
            if not (self.mistake == "sum_left_out" and step == 1):
                sums[owner] += np.array([d_s.mT @ q, p.mT @ d_out])
        for owner, total in sums.items():
            mine = np.zeros_like(total)
            self.comm.Reduce(total, mine, root=owner)
            if owner == self.comm.rank:
                d_k, d_v = mine
        return tuple(array.astype(d_out.dtype) for array in (d_q, d_k, d_v))  # type: ignore[return-value]

    def shape(self, k: Any, owner: int) -> tuple[int, ...]:
        return (*k.shape[:2], len(self.keys[owner]), k.shape[3])

    def round(self, k: Any, v: Any) -> Any:
        """Yield each owner with its K and V, while these travel on."""
        size, rank, (source, dest) = self.comm.size, self.comm.rank, self.comm.Shift(0, 1)
        kv = np.array([k, v], np.float64)
        for step in range(size):
            yield (rank - step) % size, *kv
            if step + 1 < size:
                following = np.empty((2, *self.shape(k, (rank - step - 1) % size)))
                self.comm.Sendrecv(kv, dest, recvbuf=following, source=source)
                kv = following

    def scores(self, q: Any, k: Any, owner: int) -> Any:
        queries, keys = self.queries[self.comm.rank], self.keys[owner]
        if self.mistake == "local":
            queries, keys = np.arange(len(queries)), np.arange(len(keys))
        return np.where(allowed(self.mask, queries, keys[: k.shape[2]]), q @ k.mT * self.factor, -np.inf)


sound = Ring
stale, normalised, local, left_out, twice, sum_left_out, raises, hangs = (
    partial(Ring, mistake=mistake)
    for mistake in ("stale", "normalised", "local", "left_out", "twice", "sum_left_out", "raises", "hangs")
)
"""Stale K/V in backward; each block normalised on its own; the mask by local positions; a block without its part."""


def elsewhere(**options: Any) -> Ring:
    """A player that is given no communicator and finds the ranks by itself."""
    return Ring(MPI.COMM_WORLD, **options)


def ignores(comm: MPI.Intracomm, **options: Any) -> Ring:
    """A player that sends over another communicator than it is given."""
    return Ring(MPI.COMM_WORLD, **options)
