"""Ring Attention for the ranks of one host: each reads the others' K/V in place, nothing is sent.

Each rank puts its K/V into its part of a window of memory that all ranks of the host see (`Allocate_shared`,
Hoefler et al. 2013, doi 10.1007/s00607-013-0324-2). Step by step they read what the ring would bring, so that
no two of them read, nor add to, the same part at a time:

    step 0      step 1      step 2
  0: kv 0     0: kv 2     0: kv 1        kv o is where owner o has put it
  1: kv 1     1: kv 0     1: kv 2
  2: kv 2     2: kv 1     2: kv 0

Backward, each adds its share of dK/dV where the owner will find the sum. `Fence` separates the writes of one
step from the reads of the next. None is needed at the end: before a rank writes again, all have agreed on the
next call's input, and so have read all of this one's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..messages.message import Allocate_shared, Communicator, constant
from ..messages.parcel import Parcel, nbytes
from ..problems.problem import Problem
from .base import Attention
from .options import Options, agree

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SharedRingAttention(Attention):
    """Ring Attention in the memory of one host: no messages, one fence forward, n + 1 backward.

    Parameters: see `Attention`.

    Raises
    ------
    InputError
        As `Attention`, and where the ranks are on several hosts or the arrays are not NumPy's.
    """

    def __init__(self, comm: Communicator, **options: Unpack[Options]) -> None:
        super().__init__(comm, **options)
        self.window: Any = None
        self.kvs: list[Parcel] = []
        self.d_kvs: list[Parcel] = []
        self.connect(self.comm)

    def connect(self, comm: Communicator) -> None:
        """Say in which order this rank reads the others' K/V: there are no messages, but one window."""
        self.size, self.rank = comm.Get_size(), comm.Get_rank()
        host = comm.Split_type(constant("COMM_TYPE_SHARED"))
        here = host.Get_size()
        host.Free()
        agree(comm, partial(one_host, self.size, here))
        self.owners = [(self.rank - step) % self.size for step in range(self.size)]

    def plan(self, problem: Problem) -> None:
        """Allocate the window: in each rank's part the sums of its dK/dV, then its K/V."""
        if self.buffers.xp is not np:
            raise InputError("the shared ring works in the memory of a host: give it NumPy arrays")
        self.kvs, self.d_kvs = [], []
        self.window = Allocate_shared(self.comm, nbytes(problem.d_kv(self.rank) + problem.kv(self.rank)))
        self.blocks = [problem.block(self.rank, owner) for owner in self.owners]
        for rank in range(self.size):
            part = np.frombuffer(self.window.Shared_query(rank)[0], np.uint8)
            self.d_kvs.append(Parcel(problem.d_kv(rank), part))
            self.kvs.append(Parcel(problem.kv(rank), part[self.d_kvs[rank].buffer.nbytes :]))

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to one owner's K/V a step."""
        out, lse = self.buffers.state(q)
        self.kvs[self.rank].pack(k, v)
        self.window.Fence()
        for owner, block in zip(self.owners, self.blocks, strict=True):
            if block:
                self.kernel.forward(q, *self.kvs[owner].arrays, block=block, out=out, lse=lse)
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Add to one owner's dK/dV a step."""
        d_q = self.buffers.xp.zeros(q.shape, problem.wide)
        self.kvs[self.rank].pack(k, v)
        self.d_kvs[self.rank].fill(0, 0)
        self.window.Fence()
        for owner, block in zip(self.owners, self.blocks, strict=True):
            if block:
                near, (d_k, d_v) = self.kvs[owner].arrays, self.d_kvs[owner].arrays
                self.kernel.backward(
                    q, *near, block=block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
                )
            self.window.Fence()
        d_k, d_v = self.d_kvs[self.rank].arrays
        return d_q, d_k, d_v

    def end(self, why: str) -> None:
        """Let go of the window, which is kept with the communicator."""
        super().end(why)
        self.window, self.kvs, self.d_kvs = None, [], []


def one_host(ranks: int, here: int) -> None:
    """Raise ValueError where a host has some of the ranks only."""
    if here != ranks:
        raise ValueError(
            f"the shared ring needs all {ranks} ranks on one host, here are {here}: use ring or double_ring"
        )
