"""Attention as a layer: the projections, and any algorithm between them, on this rank's tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import algorithms
from ..algorithms.options import Options, agree
from ..algorithms.sharing import shares_tokens
from ..errors import InputError
from ..messages.message import Communicator
from ..problems import grid
from ..problems.dropout import Dropout
from ..problems.scalars import shown, whole
from .function import attention, check_built
from .weights import broadcast

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionLayer(nn.Module):
    """Multi-head attention over the ranks: W_o attention(W_q x, W_k x, W_v x).

    Every rank has the weights, rank 0's to begin with, and the gradients of its own tokens: see `sum_gradients`.

    Parameters
    ----------
    d_model : int
    num_heads : int
    attention : mpiattn.Attention
        Any algorithm that shares out tokens, which tensor_parallel and decode do not. Layers may share it.
    dropout : float
        Of attention's probabilities, while training. What is dropped follows from rank 0's torch generator, and
        does not depend on the number of ranks.
    num_kv_heads : int, optional
        Heads of K and V; as many as of Q by default.
    bias : bool
        Of the projections.

    Raises
    ------
    InputError
        On every rank, where the sizes do not fit, or the attention does not share out tokens.
    """

    def __init__(
        self, d_model: int, num_heads: int, attention: algorithms.Attention, *, dropout: float = 0.0,
        num_kv_heads: int | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_attention(attention)
        sizes = d_model, num_heads, num_heads if num_kv_heads is None else num_kv_heads
        agree(attention.comm, partial(check, *sizes, dropout))
        d_model, num_heads, self.num_kv_heads = (whole(size) or 0 for size in sizes)
        self.d_model, self.num_heads = d_model, num_heads
        self.attention, self.dropout = attention, dropout
        head_dim = d_model // num_heads
        self.W_q = nn.Linear(d_model, d_model, bias)
        self.W_k = nn.Linear(d_model, self.num_kv_heads * head_dim, bias)
        self.W_v = nn.Linear(d_model, self.num_kv_heads * head_dim, bias)
        self.W_o = nn.Linear(d_model, d_model, bias)
        broadcast(self, attention.comm)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the output.

        Parameters
        ----------
        x : (batch, tokens, d_model)
            This rank's tokens: `attention.positions(tokens of the sequence)` says which.

        Returns
        -------
        (batch, tokens, d_model)
        """
        seed = self._agree(x)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        q, k, v = (
            project(x).unflatten(-1, (count, -1)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for project, count in zip((self.W_q, self.W_k, self.W_v), heads, strict=True)
        )
        drop = Dropout(self.dropout, seed) if self.training and self.dropout else None
        out = attention(self.attention, q, k, v, dropout=drop)
        result: Tensor = self.W_o(out.transpose(1, 2).flatten(2))
        return result

    def _agree(self, x: Tensor) -> int:
        """Raise InputError on every rank where one has a wrong input; return a seed of rank 0."""
        seed = int(torch.randint(2**62, ())) if self.training and self.dropout else 0
        answers = self.attention.comm.allgather((self._wrong(x), seed))
        for rank, (reason, _) in enumerate(answers):
            if reason is not None:
                raise InputError(f"on rank {rank}, {reason}")
        return int(answers[0][1])

    def _wrong(self, x: Tensor) -> str | None:
        weight = self.W_q.weight
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.d_model:
            return f"x is {tuple(getattr(x, 'shape', ()))}; it must be a tensor (batch, tokens, {self.d_model})"
        if x.device != weight.device:
            return f"x is on {x.device}, the weights on {weight.device}: move the layer with .to({str(x.device)!r})"
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"x is {x.dtype}, the weights {weight.dtype}"
        return None


class MeshAttention(AttentionLayer):
    """Mesh-Attention as a layer, as in the article that this project began with.

    Parameters
    ----------
    d_model, num_heads, dropout, num_kv_heads, bias
        As in `AttentionLayer`.
    grid_shape : (rows, cols), optional
        rows * cols is the number of ranks; the grid nearest to a square by default.
    comm : mpi4py.MPI.Comm, optional
        All ranks, `MPI.COMM_WORLD`, by default.
    **options
        Of `mpiattn.MeshAttention`: `mask=mpiattn.Causal()`, `layout="striped"`, ...
    """

    def __init__(
        self, d_model: int, num_heads: int, grid_shape: tuple[int, int] | None = None, dropout: float = 0.0,
        comm: Communicator | None = None, num_kv_heads: int | None = None, bias: bool = True,
        **options: Unpack[Options],
    ) -> None:  # fmt: skip
        if comm is None:
            from mpi4py import MPI

            comm = MPI.COMM_WORLD
        rows, cols = grid.pair(grid_shape)
        mesh = algorithms.MeshAttention(comm, rows=rows, cols=cols, **options)
        super().__init__(d_model, num_heads, mesh, dropout=dropout, num_kv_heads=num_kv_heads, bias=bias)


def check_attention(attention: algorithms.Attention) -> None:
    """Raise InputError where that is no attention, or one whose ranks have each token more than once."""
    check_built(attention)
    if not shares_tokens(attention):
        raise InputError(
            f"{type(attention).__name__} does not share out tokens: take another algorithm, such as mesh or ring"
        )


def check(d_model: int, num_heads: int, num_kv_heads: int, dropout: float) -> None:
    """Raise ValueError where the sizes of a layer do not fit."""
    for name, size in {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": num_kv_heads}.items():
        if (whole(size) or 0) < 1:
            raise ValueError(f"{name} is a whole number, 1 or more, got {shown(size)}")
    if d_model % num_heads:
        raise ValueError(f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
    Dropout(dropout)
