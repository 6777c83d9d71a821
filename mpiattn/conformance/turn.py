"""One player's turn at one case, on one rank: what it is given, what it returns, and what is wrong with that."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from .. import arrays
from ..algorithms import shares
from ..arrays import Array
from ..arrays.operations import on_host
from ..costs.traffic import sink_gradient
from ..messages.message import Communicator
from ..problems.layout import positions
from ..problems.problem import Problem
from .case import Case, problem
from .differences import cancelling, compare
from .explain import Explainer
from .player import Count, Player, Received
from .user_masks import parse


class Turn:
    """One player's turn at one case, on one rank."""

    def __init__(self, player: Player, comm: Communicator, case: Case, xp: ModuleType) -> None:
        self.player, self.comm, self.case, self.xp = player, comm, case, xp
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.given, self.right = problem(case)
        self.least = cancelling(self.given, case.scale, case.dropout)
        self.results: dict[str, Array] = {}
        self.received = Received()

    def play(self) -> None:
        """Give the player its share of the case; keep the results and the traffic."""
        case, player, names = self.case, self.player, ("q", "k", "v", "out")
        self.count = count = Count(self.comm, player.foreign)
        with contextlib.ExitStack() as stack:
            with player.refusing(case):
                built = player.factory(*([count.traced] if player.communicator else []), **case.options)
                attention = stack.enter_context(built) if hasattr(built, "__enter__") else built
            self.places = self.shares_of(attention, names)
            q, k, v, d_out = (self.own(self.given[name], name) for name in names)
            heads, self.heads = (
                shares.owned_heads(self.places[name](self.given[name].shape, self.rank)) for name in ("q", "out")
            )
            sinks = {"sinks": self.xp.asarray(self.given["sinks"][heads])} if case.sinks else {}
            count.traced.trace.clear()
            with player.refusing(case):
                out, saved = attention.forward(q, k, v, **case.given, **sinks)
            count.take("forward")
            self.keep(out=out, **({"lse": saved.lse} if hasattr(saved, "lse") or not player.foreign else {}))
            if player.backward:
                with player.refusing(case) if player.foreign else contextlib.nullcontext():
                    d_q, d_k, d_v = attention.backward(d_out, saved)
                    count.take("backward")
                    self.keep(d_q=d_q, d_k=d_k, d_v=d_v)
                    if case.sinks:
                        self.keep(d_sinks=attention.sink_gradient(d_out, saved))
                        count.take("sink_gradient")
            self.problem = getattr(attention, "problem", None) or self.posed()

    def shares_of(self, attention: object, names: Sequence[str]) -> dict[str, shares.Where]:
        """Return where each array's shares lie: as the implementation says, else by the layout."""
        if not hasattr(attention, "owned"):
            return dict.fromkeys(names, shares.by_tokens(self.case.layout, self.size))
        shapes = {name: self.given[name].shape for name in names}
        return {name: attention.owned(name, shapes) for name in names}

    def own(self, whole: Array, name: str) -> Array:
        """Return this rank's share of an array, as the player gets it."""
        share: Array = self.xp.asarray(np.ascontiguousarray(whole[self.places[name](whole.shape, self.rank)]))
        return share

    def keep(self, **results: Array) -> None:
        """Keep results, as NumPy's arrays."""
        self.results |= {name: np.asarray(on_host(result)) for name, result in results.items()}

    def posed(self) -> Problem:
        """Return the case as a problem, for the formulas."""
        case, (_, _, keys, _) = self.case, self.case.shapes["k"]
        return Problem(
            self.size, case.batch, case.heads, case.kv_heads, case.head_dim, case.v_head_dim, case.tokens, keys,
            arrays.dtype(case.dtype), case.layout, parse(case.mask), partials=case.partials,
        )  # fmt: skip

    def judge(self) -> list[str]:
        """Return what is wrong with the results and the traffic on this rank; all ranks call it together."""
        wrong: list[str] = []
        for name, result in self.results.items():
            whole = self.right[name]
            if name == "d_sinks":
                wrong += compare(name, result, whole[self.heads], whole, self.case.dtype, self.least[name])
                continue
            like = "out" if name == "lse" else name.removeprefix("d_")
            place = self.places[like]
            if name in ("d_k", "d_v"):
                result = with_copies(self.comm, result, place, whole.shape)
            here = place(whole.shape, self.rank)
            tokens = np.arange(whole.shape[2])[here[2] if len(here) > 2 else slice(None)]
            least = self.least.get(name, 0)
            told = compare(name, result, whole[here], whole, self.case.dtype, least, tokens)
            if told and not any(text.startswith("error of out") for text in wrong):  # else what follows from it
                told[0] += self.explained(name, result, least)
            wrong += told
        self.received = self.count.received()
        self.received.unchecked |= {"lse"} - self.results.keys()
        return wrong + self.traffic()

    def explained(self, name: str, result: Array, least: float) -> str:
        """Return which block explains a wrong result, where the ranks share out the tokens and nothing else."""
        chunks = []
        for like in ("out", "k"):
            shape = self.given[like].shape
            chunks.append([positions(self.case.layout, shape[2], self.size, rank) for rank in range(self.size)])
            here = self.places[like](shape, self.rank)
            if len(here) != 3 or not np.array_equal(here[2], chunks[-1][self.rank]):
                return ""
        queries, keys = chunks
        return Explainer(self.case, self.given, self.right, queries, keys, self.rank).explain(name, result, least)

    def traffic(self) -> list[str]:
        """Return where this rank received something else than the formula says."""
        if self.player.traffic is None:
            return []
        costs = self.player.traffic(self.problem, self.rank)
        formulas = {"forward": costs.forward, "backward": costs.backward}
        if "sink_gradient" in self.received.passes:
            formulas["sink_gradient"] = sink_gradient(self.problem, self.rank)
        wrong = []
        for name, seen in self.received.passes.items():
            if seen != formulas[name]:
                text = f"{name} received {seen.messages} messages of {seen.nbytes} bytes"
                wrong.append(f"{text}, the formula says {formulas[name]}")
        return wrong


def with_copies(comm: Communicator, gradient: Array, place: shares.Where, shape: tuple[int, ...]) -> Array:
    """Return a share of a gradient plus that of its copies on other ranks, as of K/V heads in tensor parallelism."""
    here, copies = place(shape, comm.Get_rank()), np.zeros(shape, int)
    for rank in range(comm.Get_size()):
        copies[place(shape, rank)] += 1
    if copies.max(initial=0) <= 1:
        return gradient
    whole = np.zeros(shape)
    fits = gradient.shape == whole[here].shape
    if fits:
        whole[here] = gradient
    total = np.sum(comm.allgather(whole), axis=0)[here].astype(gradient.dtype)
    return total if fits else gradient
