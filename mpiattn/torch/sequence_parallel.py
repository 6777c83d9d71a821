"""Any module over the ranks: the full sequence on rank 0 in, the full output on rank 0 out, gradients too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..algorithms.options import agree
from ..algorithms.shares import gather, scatter
from ..errors import InputError
from ..messages.connection import private
from ..messages.message import Communicator
from ..problems import layout as layouts
from .arrays import to_array, to_tensor
from .layers import AttentionLayer
from .weights import broadcast, refuse, sum_gradients

TOKENS = 1
"""Axis of the tokens in (batch, tokens, d_model)."""


class SequenceParallel(nn.Module):
    """A module that computes on each rank's tokens, behind a scatter and before a gather.

    Parameters
    ----------
    module : torch.nn.Module
        From (batch, tokens, ...) to (batch, tokens, ...), for this rank's tokens: what mixes tokens in it is an
        `AttentionLayer` such as `MeshAttention`; all else treats each token alone. Its weights become rank 0's.
    comm : mpi4py.MPI.Comm
        The one that the module's attention was built with, or another of the same ranks in the same order.
    layout : {"contiguous", "zigzag", "striped"}, optional
        That of the module's attention by default, contiguous where there is none.

    Notes
    -----
    The loss is rank 0's. The other ranks get an output without tokens, from which they go backward beside it:

        out = parallel(x if rank == 0 else None)
        loss = criterion(out, target) if rank == 0 else out.sum()
        loss.backward()
        parallel.sum_gradients()

    Raises
    ------
    InputError
        On every rank, where the modules of the ranks or the layouts of their layers differ, or a layer's attention is
        of other ranks.
    """

    def __init__(self, module: nn.Module, comm: Communicator, layout: str | None = None) -> None:
        super().__init__()
        comm = private(comm)  # the caller's messages never meet these
        inside = sorted({part.attention.layout for part in module.modules() if isinstance(part, AttentionLayer)})
        found = inside if layout is None else sorted({layout, *inside})
        self.module, self.comm = module, comm
        agree(comm, partial(one_layout, *found), partial(self._check_ranks))
        self.layout = found[0] if found else "contiguous"
        broadcast(module, self.comm)

    def forward(self, x: Tensor | None) -> Tensor:
        """Return the module's output on rank 0, and an output without tokens elsewhere.

        Parameters
        ----------
        x : (batch, tokens, d_model) on rank 0, None elsewhere

        Returns
        -------
        (batch, tokens, d_model) on rank 0, (batch, 0, d_model) elsewhere
        """
        root = self.comm.Get_rank() == 0
        device = next((weight.device for weight in self.module.parameters()), torch.device("cpu"))
        refuse(self.comm, wrong(x, device) if root else None)
        # Also the other ranks go backward through the scatter, if rank 0 wants the gradient of x.
        wanted = self.comm.bcast(root and x is not None and x.requires_grad)
        whole = x if root else torch.empty(0, device=device, requires_grad=wanted)
        own = Scatter.apply(whole, self.comm, self.layout, device)
        result: Tensor = Gather.apply(self.module(own), self.comm, self.layout)
        return result

    def sum_gradients(self) -> None:
        """Add up the gradients of the weights over the ranks, once before a step; see `sum_gradients`."""
        sum_gradients(self.module, self.comm)

    def _check_ranks(self) -> None:
        """Raise InputError where a layer's attention has ended, or is of other ranks: it would miss tokens."""
        for name, part in self.module.named_modules():
            if isinstance(part, AttentionLayer):
                part.attention.usable()
                if not same_ranks(part.attention.comm, self.comm):
                    raise InputError(
                        f"the attention of {name or 'the module'} was built with other ranks than those of comm, or in "
                        "another order: give both one communicator"
                    )


def same_ranks(one: Any, other: Any) -> bool:
    """Return whether two private communicators have the same ranks in the same order."""
    one, other = (getattr(comm, "comm", comm) for comm in (one, other))  # in a watched one is MPI's
    if isinstance(one, MPI.Comm) and isinstance(other, MPI.Comm):
        return MPI.Comm.Compare(one, other) in (MPI.IDENT, MPI.CONGRUENT)
    return (one.Get_size(), one.Get_rank()) == (other.Get_size(), other.Get_rank())


def one_layout(*names: str) -> None:
    """Raise ValueError where these are several layouts, or one that there isn't."""
    for name in names:
        layouts.check(name.partition("/")[0])
    if len(names) > 1:
        raise ValueError(f"the layouts {' and '.join(names)} differ: build all layers with one")


def wrong(x: object, device: torch.device) -> str | None:
    """Return what is wrong with rank 0's input."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return "there is no tensor (batch, tokens, ...) to share out"
    if x.device != device:
        return f"x is on {x.device}, the module on {device}: move one of them with .to()"
    return None


class Scatter(torch.autograd.Function):
    """The tokens of this rank, of rank 0's tensor; backward, rank 0 gets the gradients of all."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, comm: Communicator, layout: str, device: torch.device) -> Tensor:
        """Scatter the tokens of rank 0."""
        ctx.comm, ctx.layout, ctx.shape = comm, layout, whole.shape
        array = to_array(whole.cpu()) if comm.Get_rank() == 0 else None
        return to_tensor(scatter(array, comm, layout, axis=TOKENS)).to(device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gather the gradients on rank 0."""
        whole = gather(to_array(gradient.cpu()), ctx.comm, ctx.layout, axis=TOKENS)
        result = gradient.new_zeros(ctx.shape) if whole is None else to_tensor(whole).to(gradient.device)
        return result, None, None, None


class Gather(torch.autograd.Function):
    """The tokens of all ranks on rank 0, none elsewhere; backward, each rank gets the gradient of its tokens."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, comm: Communicator, layout: str) -> Tensor:
        """Gather the tokens on rank 0."""
        ctx.comm, ctx.layout = comm, layout
        whole = gather(to_array(own.cpu()), comm, layout, axis=TOKENS)
        return own[:, :0] * 1 if whole is None else to_tensor(whole).to(own.device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scatter the gradient of rank 0."""
        array = to_array(gradient.cpu()) if ctx.comm.Get_rank() == 0 else None
        return to_tensor(scatter(array, ctx.comm, ctx.layout, axis=TOKENS)).to(gradient.device), None, None
