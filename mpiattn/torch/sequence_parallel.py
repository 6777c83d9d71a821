"""Any module over the ranks: the full sequence on rank 0 in, the full output on rank 0 out, gradients too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..algorithms.options import agree
from ..algorithms.shares import gather, scatter
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
        The one that the module's attention was built with.
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
        On every rank, where the modules of the ranks or the layouts of their layers differ.
    """

    def __init__(self, module: nn.Module, comm: Communicator, layout: str | None = None) -> None:
        super().__init__()
        comm = private(comm)  # the caller's messages never meet these
        inside = sorted({part.attention.layout for part in module.modules() if isinstance(part, AttentionLayer)})
        found = inside if layout is None else sorted({layout, *inside})
        agree(comm, partial(one_layout, *found))
        self.module, self.comm = module, comm
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
        """Add up the gradients of the weights over the ranks, after `backward`; see `sum_gradients`."""
        sum_gradients(self.module, self.comm)


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
