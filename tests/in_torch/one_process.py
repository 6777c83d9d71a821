"""The same in one process, for tests: textbook attention of whole tensors, and whole tensors cut and joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor


def textbook(qkv: Sequence[Tensor], allowed: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v of whole sequences; allowed: (tokens, tokens)."""
    q, k, v = qkv
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def inputs(tokens: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2)) -> Any:
    """Return q, k, v and the gradient of out, the same on every rank; V has another head_dim."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads[0], tokens, 8), (2, heads[1], tokens, 8), (2, heads[1], tokens, 6), (2, heads[0], tokens, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def share(attention: Any, *tensors: Tensor) -> list[Tensor]:
    """Return this rank's tokens of whole tensors."""
    mine = torch.as_tensor(attention.positions(tensors[0].shape[2]))
    return [tensor[:, :, mine] for tensor in tensors]


def whole(attention: Any, own: Tensor, tokens: int) -> Tensor:
    """Return the whole tensor of every rank's tokens, on every rank."""
    result = torch.zeros(*own.shape[:2], tokens, own.shape[3], dtype=torch.float64)
    result[:, :, torch.as_tensor(attention.positions(tokens))] = own.detach().double()
    attention.comm.Allreduce(MPI.IN_PLACE, result.numpy())
    return result


class Cut(torch.autograd.Function):
    """This rank's tokens of a tensor that all ranks hold; its gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, attention: Any, tensor: Tensor) -> Tensor:
        ctx.attention, ctx.tokens = attention, tensor.shape[2]
        return share(attention, tensor)[0].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, whole(ctx.attention, gradient, ctx.tokens)


class Join(torch.autograd.Function):
    """The whole tensor on every rank, of which each of them has some tokens."""

    @staticmethod
    def forward(ctx: Any, attention: Any, own: Tensor, tokens: int) -> Tensor:
        ctx.attention = attention
        return whole(attention, own, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, share(ctx.attention, gradient)[0], None


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest number of the second."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0


def worst(own: Sequence[Tensor], expected: Sequence[Tensor], small: float = 1e-4) -> float:
    """Return the largest relative error of several tensors; of one that is nearly 0 beside the others, as of these.

    The bias of K has no gradient but rounding errors: it adds the same to all scores of a query.
    """
    least = small * max(float(tensor.detach().abs().max()) for tensor in expected)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(own, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(least)) for a, b in pairs)
