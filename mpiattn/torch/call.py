"""One call of a sharded model: what each of its layers computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..algorithms import Attention
from ..messages.message import Communicator
from ..problems.dropout import Dropout
from ..problems.mask import Causal, Documents, Mask, SlidingWindow
from .batch import Batch
from .function import within


@dataclass(frozen=True)
class Call:
    """One call of a sharded model, which its layers are handed, and again where they are computed anew in backward."""

    built: Callable[..., Attention]
    """`Sharded.attention`."""
    batch: Batch
    seed: int
    """Of the first layer's dropout; the other layers have those that follow."""

    @cached_property
    def mine(self) -> Tensor:
        """Which tokens of each row this rank computes: int64."""
        positions = self.built(self.mask(None)).positions(self.batch.input_ids.shape[1])
        return torch.as_tensor(positions, device=self.batch.input_ids.device)

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's tokens, their positions, and their places; of the first two, one at least.

        Models take no sequences without a token: a rank that has none computes one that no other rank sees.
        """
        some = self.mine if len(self.mine) else self.mine.new_zeros(1)
        return self.batch.input_ids[:, some], self.batch.position_ids[:, some], self.batch.places[:, self.mine]

    def mask(self, window: int | None) -> Mask:
        """Return which tokens a layer sees that has a window, or none."""
        mask: Mask = Causal() if window is None else SlidingWindow(window - 1)
        return mask if self.batch.documents is None else Documents(self.batch.documents) & mask

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None, softcap: float | None,
        sinks: Tensor | None, dropout: float, layer: int,
    ) -> Tensor:  # fmt: skip
        """Attend for a layer: this rank's queries to the keys of all."""
        drop = Dropout(dropout, self.seed + layer) if dropout else None
        attention = self.built(self.mask(window), scale, softcap)
        q, k, v = (tensor[:, :, : len(self.mine)] for tensor in (q, k, v))
        out = within(self.batch, attention, q, k, v, sinks, drop)
        return out if len(self.mine) else torch.nn.functional.pad(out, (0, 0, 0, 1))


class SumOfRanks(torch.autograd.Function):
    """The sum of a number over the ranks, in their order; each goes back through its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, comm: Communicator) -> Tensor:
        """Return the sum, on every rank."""
        return torch.full_like(own, sum(comm.allgather(own.item())))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of this rank's number."""
        return gradient, None
