"""LLaMA's layers in torch's operations: attention is handed in, tokens may be any of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of q, k and v: (1, heads, tokens, head_dim), of K and V (1, kv_heads, tokens, head_dim)."""

CHUNK = 2**12
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; those of LLaMA-7B but for its 32 layers are 4096 features, 32 heads and 32,000 words."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def mlp(self) -> int:
        """Features between the matrices of an MLP: 8/3 of the others, up to a multiple of 256, as LLaMA has them."""
        return -(-8 * self.hidden // (3 * 256)) * 256

    def __str__(self) -> str:
        heads = f"heads {self.heads} (of K and V {self.kv_heads})"
        return f"layers {self.layers}, features {self.hidden}, {heads}, words {self.vocabulary}"


class Block(nn.Module):
    """A layer: attention with rotary embeddings, and a gated MLP."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        hidden, shared = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(hidden, 1e-5, device=device, dtype=dtype) for _ in "am")
        self.W_q, self.W_o = linear(hidden, hidden), linear(hidden, hidden)
        self.W_k, self.W_v = linear(hidden, shared), linear(hidden, shared)
        self.W_gate, self.W_up, self.W_down = (
            linear(hidden, sizes.mlp),
            linear(hidden, sizes.mlp),
            linear(sizes.mlp, hidden),
        )

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return (1, tokens, hidden), of as many."""
        h = self.attention_norm(x)
        q = self.W_q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (1, heads, tokens, head_dim)
        k, v = (W(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for W in (self.W_k, self.W_v))
        out = attend(turned(q, *turn), turned(k, *turn), v)
        x = x + self.W_o(out.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        result: Tensor = x + self.W_down(functional.silu(self.W_gate(h)) * self.W_up(h))
        return result


class Llama(nn.Module):
    """A decoder; the weights are random, by torch's generator of the device."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = sizes.hidden // sizes.heads
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(sizes, device, dtype) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, 1e-5, device=device, dtype=dtype)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device, dtype=dtype)

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor, attend: Attend, recompute: bool) -> Tensor:
        """Return the sum of the cross entropies of some tokens.

        Parameters
        ----------
        ids, targets, positions : int64, (tokens,)
            The tokens, what follows each, and where in the sequence each lies.
        attend : function
        recompute : bool
            Keep no more of a block than its input, and compute the rest again in backward.
        """
        x = self.embed(ids)[None]  # (1, tokens, hidden)
        turn = angles(positions, self.head_dim, x.dtype)
        for block in self.blocks:
            x = again(block, x, turn, attend) if recompute else block(x, turn, attend)
        parts = zip(self.norm(x)[0].split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.stack([again(self.cross_entropy, h, part) for h, part in parts]).sum()

    def cross_entropy(self, h: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross entropies of a chunk, (tokens, hidden), in float32 or wider."""
        logits = self.head(h)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, targets, reduction="sum")


again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Call a function, keep its arguments alone, and call it again in backward."""


def angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of rotary embeddings: (tokens, head_dim / 2)."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angle = positions.double()[:, None] * 10000.0**-steps
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return q or k with its rotary embeddings: pairs of features are half a head apart."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
