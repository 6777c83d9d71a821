"""The keys and values of the tokens so far, spread over the ranks.

Of a prompt of 8 tokens, zigzag over 2 ranks, and tokens 8, 9, 10, which follow in turn:

    rank 0:  k v of 0 1 6 7    8 10
    rank 1:  k v of 2 3 4 5    9
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..messages.message import Communicator
from ..problems.mask import Positions
from .config import Config

STEP = 256
"""Tokens by which the memory grows."""


class Cache:
    """Part of one rank of the cache of all blocks.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks that hold it together.
    config : Config
    like : array
        Of the namespace and the dtype of the keys and values.

    Attributes
    ----------
    length : int
        Tokens of all ranks.
    """

    def __init__(self, comm: Communicator, config: Config, like: Array, xp: ModuleType) -> None:
        self.size, self.rank = comm.Get_size(), comm.Get_rank()
        self.config, self.xp = config, xp
        self.length = 0
        self.positions: Positions = np.empty(0, np.int64)
        shape = 2, 1, config.num_key_value_heads, 0, config.head_dim  # (k or v, batch, heads, tokens, head_dim)
        self.memory: list[Array] = [xp.empty(shape, like.dtype)] * config.num_hidden_layers

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of this rank."""
        return sum(part.nbytes for block in range(len(self.memory)) for part in self.of(block))

    def extend(self, positions: Positions, length: int) -> None:
        """Make room for the tokens at these positions, on this rank, of a sequence of that length."""
        held = len(self.positions)
        self.positions, self.length = np.concatenate([self.positions, positions]), length
        room = (len(self.positions) // STEP + 1) * STEP
        for block, memory in enumerate(self.memory):
            if len(self.positions) > memory.shape[3]:
                grown = self.xp.empty((*memory.shape[:3], room, memory.shape[4]), memory.dtype)
                grown[..., :held, :] = memory[..., :held, :]
                self.memory[block] = grown

    def put(self, block: int, k: Array, v: Array) -> None:
        """Set the last keys and values of a block, those that `extend` has made room for."""
        end, count = len(self.positions), k.shape[2]
        memory = self.memory[block]
        memory[0, :, :, end - count : end] = k
        memory[1, :, :, end - count : end] = v

    def of(self, block: int) -> tuple[Array, Array]:
        """Return this rank's keys and values of a block: (batch, heads, tokens, head_dim) each."""
        k, v = self.memory[block][..., : len(self.positions), :]
        return k, v

    def owned(self, length: int) -> Positions:
        """Return the positions of this rank's tokens among those that make the sequence that long: each in turn."""
        new = np.arange(self.length, length)
        mine: Positions = new[new % self.size == self.rank]
        return mine

    def check(self, comm: Communicator, config: Config) -> None:
        """Raise InputError, on every rank alike, where the ranks do not hold each token's keys and values once."""
        everything = comm.allgather((self.size, self.rank, self.length, self.positions, self.config))
        ranks = comm.Get_size()
        for rank, (size, place, length, _, other) in enumerate(everything):
            if (size, place) != (ranks, rank):
                raise InputError(
                    f"the cache on rank {rank} of {ranks} is that of rank {place} of {size}: prefill with these ranks"
                )
            if length != everything[0][2]:
                raise InputError(f"the cache on rank {rank} is of {length} tokens, on rank 0 of {everything[0][2]}")
            if other != config:
                raise InputError(f"the cache on rank {rank} is another model's")
        held = np.sort(np.concatenate([positions for *_, positions, _ in everything]))
        if not np.array_equal(held, np.arange(everything[0][2])):
            raise InputError(
                f"the caches of the {ranks} ranks do not have each of {everything[0][2]} tokens once: "
                "they belong to different prompts or layouts"
            )
