"""The problem of decoding: the last tokens of a sequence against a K/V cache that is spread over ranks; no MPI."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Spec
from ..errors import InputError
from . import layout
from .mask import END, Full, Mask, Positions
from .pairs import counts
from .problem import Problem


@dataclass(frozen=True)
class CacheProblem(Problem):
    """Attention of the last tokens of a sequence, the same on every rank, to a cache spread over ranks.

    Attributes
    ----------
    shards : for each rank, (tokens, position of the first, position after the last) of its part of the cache
    given : bytes or None
        Positions of this rank's part, int64, where they do not follow from the layout.
    """

    shards: tuple[tuple[int, int, int], ...]
    given: bytes | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the one sequence that both queries and keys are of."""
        length = max(end for *_, end in self.shards)
        return length, length

    @cached_property
    def queries(self) -> Positions:
        """Positions of the queries: the last ones of the sequence."""
        first = max(self.lengths[0] - self.q_tokens, 0)
        return np.arange(first, first + self.q_tokens)

    @cached_property
    def q_positions(self) -> list[Positions]:
        """Each rank's query positions."""
        return [self.queries] * self.ranks

    @cached_property
    def kv_positions(self) -> list[Positions]:
        """Each rank's key positions; where they were given, as if a shard were one run: no rank knows all."""
        return [self._shard(rank) for rank in range(self.ranks)]

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Pairs that the mask leaves of each block, as in `Problem`, at the positions of the cache."""
        return counts(self.mask, self.q_positions, self.kv_positions)

    def keys(self, rank: int) -> Positions:
        """Return the positions of this rank's keys."""
        return self._shard(rank) if self.given is None else np.frombuffer(self.given, np.int64)

    def _shard(self, rank: int) -> Positions:
        tokens, first, end = self.shards[rank]
        if tokens == end - first or self.given is not None:
            return np.arange(first, first + tokens)
        return layout.positions(self.layout, self.kv_tokens, self.ranks, rank)

    @cached_property
    def sees(self) -> list[bool]:
        """Whether the mask lets a query reach between the first and the last key of each rank."""
        lo, hi = self.mask.bounds(self.queries)
        return [
            tokens > 0 and bool((np.maximum(lo, first) < np.minimum(hi, end)).any())
            for tokens, first, end in self.shards
        ]


def heads_of(heads: int, ranks: int, rank: int) -> slice:
    """Return the heads of which a rank has the result after an all-to-all: as even as can be."""
    return slice(rank * heads // ranks, (rank + 1) * heads // ranks)


def some_heads(specs: Sequence[Spec], heads: slice) -> list[Spec]:
    """Return shapes and dtypes of some of the heads of arrays that have all."""
    return [((shape[0], heads.stop - heads.start, *shape[2:]), dtype) for shape, dtype in specs]


def span(positions: Positions | None, shape: tuple[int, ...]) -> list[int]:
    """Return of a shard's positions: if they are given, if they are sound, the first, and one after the last."""
    if positions is None:
        return [0, 1, 0, 0]
    sound = isinstance(positions, np.ndarray) and positions.dtype == np.int64 and positions.shape == shape[2:3]
    if not (sound and (positions[1:] > positions[:-1]).all()):
        return [1, 0, 0, 0]
    if not len(positions):
        return [1, 1, 0, 0]
    first, last = int(positions[0]), int(positions[-1])
    return [1, 1, first, last + 1] if 0 <= first <= last < END else [1, 0, 0, 0]


def posed_to_cache(
    specs: Sequence[Sequence[Any]], spans: Sequence[Sequence[int]], own: bytes | None, name: str, mask: Mask
) -> CacheProblem:
    """Return the problem that all ranks' q, k, v and positions pose, or raise InputError, the same on every rank.

    Parameters
    ----------
    specs : for each rank, (shape, dtype) of q, k and v, which fit together
    spans : for each rank, what `span` returned
    own : positions of this rank's keys, where they are given
    name, mask : the layout's name, and the mask
    """
    ranks = len(specs)
    for rank, ((q, *_), (has, sound, *_)) in enumerate(zip(specs, spans, strict=True)):
        if q != specs[0][0]:
            raise InputError(f"q is {q[0]} on rank {rank}, {specs[0][0][0]} on rank 0: all ranks take the same queries")
        if has != spans[0][0]:
            raise InputError(f"kv_positions are given on rank {0 if spans[0][0] else rank}, not on all ranks")
        if not sound:
            raise InputError(f"kv_positions on rank {rank} must be int64, 0 to 2**63 - 2, ascending, one for each key")
    (q, dtype), (k, _), (v, _) = specs[0]
    tokens = [shape[2] for _, (shape, _), _ in specs]
    ends = list(itertools.accumulate(tokens))
    if own is not None:
        shards = [(count, first, end) for count, (_, _, first, end) in zip(tokens, spans, strict=True)]
    elif name == "contiguous":
        shards = [(count, end - count, end) for count, end in zip(tokens, ends, strict=True)]
    else:
        owned = [layout.positions(name, ends[-1], ranks, rank) for rank in range(ranks)]
        for rank, (count, chunk) in enumerate(zip(tokens, owned, strict=True)):
            if count != len(chunk):
                raise InputError(
                    f"k on rank {rank} has {count} tokens, the {name} layout gives it {len(chunk)} of {ends[-1]}: "
                    "a cache of other shards is contiguous, or has kv_positions"
                )
        shards = [(len(chunk), *((int(chunk[0]), int(chunk[-1]) + 1) if len(chunk) else (0, 0))) for chunk in owned]
    batch, heads, q_tokens, head_dim = q
    length = max(end for *_, end in shards)
    if q_tokens > length and mask != Full():
        raise InputError(f"the {q_tokens} queries are the last tokens of a sequence of {length}: their keys come first")
    try:
        mask.check(length, length)
    except ValueError as error:
        raise InputError(str(error)) from None
    sizes = batch, heads, k[1], head_dim, v[3], q_tokens, ends[-1]
    return CacheProblem(ranks, *sizes, dtype, name, mask, tuple(shards), own)
