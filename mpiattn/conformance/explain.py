"""Which block explains a wrong result: one whose keys were left out, or taken twice.

A block is the queries of one rank against the keys of one. Results are compared with what the oracle gets without the
block, or with its keys there twice. Gradients are sums over blocks, of which one is taken away or added; their
probabilities are the right ones, so they are only explained where the forward pass is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from ..problems.mask import Positions
from . import oracle
from .case import Case
from .differences import matches, runs
from .user_masks import parse
from .visible import Visible, visible

TIMES = {0: "left out", 2: "taken twice"}


class Explainer:
    """Results of one rank as they would be with a block left out or taken twice.

    Parameters
    ----------
    case : Case
    given, right : dict of arrays
        From `case.problem`.
    queries, keys : sequence of int64
        Positions of each rank's.
    rank : int
    """

    def __init__(
        self, case: Case, given: dict[str, Array], right: dict[str, Array], queries: Sequence[Positions],
        keys: Sequence[Positions], rank: int,
    ) -> None:  # fmt: skip
        self.case, self.given, self.right = case, given, right
        self.queries, self.keys, self.rank = queries, keys, rank
        self.mask: Visible = visible(parse(case.mask), np.arange(case.tokens), np.arange(case.shapes["k"][2]))
        self.features: dict[str, Any] = {"softcap": case.softcap, "sinks": given["sinks"] if case.sinks else None}

    def explain(self, name: str, result: Array, least: float = 0) -> str:
        """Return which block explains a result that is wrong, or nothing."""
        if self.case.dropout or result.ndim < 3:  # what is dropped goes by the keys' positions
            return ""
        candidates = self.forward if name in ("out", "lse") else self.backward
        for text, candidate in candidates(name):
            if candidate.shape == result.shape and matches(result, candidate, self.case.dtype, least):
                return f"\n    as if {text}"
        return ""

    def forward(self, name: str) -> Iterator[tuple[str, Array]]:
        """Return what out or lse would be without each block, and with it twice."""
        q, k, v = (self.given[key] for key in "qkv")
        everything, mine = np.arange(k.shape[2]), self.queries[self.rank]
        for owner, keys in enumerate(self.keys):
            if not self.mask[np.ix_(mine, keys)].any():
                continue
            for times, said in TIMES.items():
                chosen = np.setdiff1d(everything, keys) if times == 0 else np.concatenate([everything, keys])
                results = oracle.attention(
                    q, k[:, :, chosen], v[:, :, chosen], self.mask[:, chosen], self.case.scale, mine, **self.features
                )
                yield self.block(self.rank, owner, said), results[name == "lse"]

    def backward(self, name: str) -> Iterator[tuple[str, Array]]:
        """Return what d_q, d_k or d_v would be without each block, with it twice, and with one in another's place."""
        mine = self.queries[self.rank] if name == "d_q" else self.keys[self.rank]
        right = self.right[name][:, :, mine]
        parts = self.d_q_parts() if name == "d_q" else self.d_kv_parts("qkv".index(name[-1]))
        for other, part in parts.items():
            block = (self.rank, other) if name == "d_q" else (other, self.rank)
            yield self.block(*block, TIMES[0]), right - part
            yield self.block(*block, TIMES[2]), right + part
        if name == "d_q":
            for one, other in itertools.permutations(parts, 2):
                text = f"{self.block(self.rank, one, TIMES[0])}, and the keys of rank {other} {TIMES[2]} instead"
                yield text, right - parts[one] + parts[other]

    def d_q_parts(self) -> dict[int, Array]:
        """Return what the keys of each rank contribute to this rank's d_q."""
        q, k, v = (self.given[key].astype(np.float64) for key in "qkv")
        mine, parts = self.queries[self.rank], {}
        scale = q.shape[3] ** -0.5 if self.case.scale is None else self.case.scale
        for owner, keys in enumerate(self.keys):
            if self.mask[np.ix_(mine, keys)].any():
                # Keys with a second half, which meets zeros of the queries: the scores stay, and d_q has one, too.
                second = np.zeros_like(k)
                second[:, :, keys] = k[:, :, keys]
                longer = np.concatenate([q, np.zeros_like(q)], axis=3), np.concatenate([k, second], axis=3)
                d_out = self.given["out"][:, :, mine]
                d_q, _, _ = oracle.gradients(*longer, v, d_out, self.mask, scale, mine, **self.features)
                parts[owner] = d_q[..., q.shape[3] :]
        return parts

    def d_kv_parts(self, which: int) -> dict[int, Array]:
        """Return what the queries of each rank contribute to this rank's d_k (1) or d_v (2)."""
        q, k, v = (self.given[key] for key in "qkv")
        keys, parts = self.keys[self.rank], {}
        for owner, theirs in enumerate(self.queries):
            if self.mask[np.ix_(theirs, keys)].any():
                d_out = self.given["out"][:, :, theirs]
                sums = oracle.gradients(q, k, v, d_out, self.mask, self.case.scale, theirs, **self.features)
                parts[owner] = sums[which][:, :, keys]
        return parts

    def block(self, queries: int, keys: int, said: str) -> str:
        """Return a block in words."""
        of_queries, of_keys = runs(self.queries[queries]), runs(self.keys[keys])
        return f"the block of rank {queries}'s queries ({of_queries}) and rank {keys}'s keys ({of_keys}) were {said}"
