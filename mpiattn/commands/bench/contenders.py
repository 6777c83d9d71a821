"""Contenders of `mpiattn bench attention`: algorithms, with and without messages, and one kernel call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from ...algorithms import ALGORITHMS, Attention
from ...algorithms.saved import Saved
from ...arrays import Array, accumulator
from ...arrays.operations import cast
from ...arrays.softmax import LSE
from ...messages.message import Communicator
from ...problems.block import Block
from ...problems.mask import Full, Mask
from ...problems.pairs import pairs
from ..timing import timed
from .quiet import silence

PASSES = ("forward", "forward+backward")

LEAST = 0.05  # seconds that a timing takes, by as many calls as that needs


@dataclass
class Contender:
    """Something to measure: what queues each pass, and what has to be so around that."""

    name: str
    run: Mapping[str, Callable[[], object]]
    fraction: float = 1.0
    """Of the whole problem's operations on all ranks, what a call does."""
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def measure(self, name: str, comm: Communicator, xp: ModuleType) -> float:
        """Return the seconds of one call, of the slowest rank."""
        run = self.run[name]
        with self.around(name):
            run()
            if name not in self.calls:
                self.calls[name] = max(math.ceil(LEAST / timed(comm, run, 1, xp)), 2)
            return timed(comm, run, self.calls[name], xp)


@dataclass
class Setting:
    """The problem, and this rank's means to compute it."""

    comm: Communicator
    xp: ModuleType
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    mask: Mask
    options: dict[str, Any]

    def random(self, heads: int, tokens: int) -> Array:
        """Return random numbers, (1, heads, tokens, head_dim); in NumPy the same on all ranks, as decode asks."""
        shape = (1, heads, tokens, self.head_dim)
        if self.xp is np:
            return np.random.default_rng(0).standard_normal(shape).astype(self.dtype)
        return cast(self.xp.random.standard_normal(shape, dtype=np.float32), self.dtype)

    @property
    def operations(self) -> float:
        """Operations of the whole problem, forward."""
        everything = np.arange(self.tokens)
        return 4.0 * pairs(self.mask, everything, everything) * self.heads * self.head_dim


def algorithm(setting: Setting, label: str, name: str, arguments: dict[str, Any]) -> list[Contender]:
    """Return an algorithm, and the same without messages."""
    result = []
    for quiet in (False, True):
        attention = ALGORITHMS[name](setting.comm, mask=setting.mask, **setting.options, **arguments)
        heads = {"q": setting.heads, "k": setting.kv_heads, "v": setting.kv_heads, "out": setting.heads}
        shapes = {part: (1, count, setting.tokens, setting.head_dim) for part, count in heads.items()}
        rank = setting.comm.Get_rank()
        own = {
            part: setting.random(*_size(attention.owned(part, shapes)(shape, rank), shape))
            for part, shape in shapes.items()
        }
        _, saved = attention.forward(own["q"], own["k"], own["v"])
        attention.backward(own["out"], saved)
        if quiet:
            silence(attention)
        forward = partial(attention.forward, own["q"], own["k"], own["v"])

        def both(
            attention: Attention = attention, own: dict[str, Array] = own,
            forward: Callable[[], tuple[Array, Saved]] = forward,
        ) -> None:  # fmt: skip
            _, saved = forward()
            attention.backward(own["out"], saved)

        suffix = " without messages" if quiet else ""
        result.append(Contender(label + suffix, {"forward": forward, "forward+backward": both}))
    return result


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return heads and tokens of a share."""
    share = np.broadcast_to(np.int8(0), shape)[index]
    return share.shape[1], share.shape[2]


def one_call(setting: Setting) -> Contender:
    """Return a kernel call of a rank's queries against its own keys."""
    tokens = setting.tokens // setting.comm.Get_size()
    with ALGORITHMS["ring"](setting.comm, mask=Full(), **{**setting.options, "layout": "contiguous"}) as attention:
        q, k, v, d_out = (
            setting.random(heads, tokens)
            for heads in (setting.heads, setting.kv_heads, setting.kv_heads, setting.heads)
        )
        attention.agree_forward(q, k, v)
        kernel = attention.kernel
    wide, xp = accumulator(setting.dtype), setting.xp
    block = Block(Full(), np.arange(tokens), np.arange(tokens))
    out, lse = xp.zeros(q.shape, wide), xp.full(q.shape[:3], -math.inf, LSE)
    delta = xp.zeros(q.shape[:3], wide)
    d_q, d_k, d_v = (xp.zeros(array.shape, wide) for array in (q, k, v))
    final = xp.full(q.shape[:3], math.log(tokens), LSE)

    def forward() -> None:
        kernel.forward(q, k, v, block=block, out=out, lse=lse)

    def both() -> None:
        forward()
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=final, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v)

    pieces = setting.comm.Get_size() * 4.0 * tokens**2 * setting.heads * setting.head_dim
    run = {"forward": forward, "forward+backward": both}
    return Contender(f"one call, {kernel.name}", run, pieces / setting.operations)
