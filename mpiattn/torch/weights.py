"""Weights, the same on every rank, and their gradients, of which each rank has that of its own tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..arrays import namespace
from ..errors import InputError
from ..messages.connection import carrying, private
from ..messages.message import Communicator, Rows
from ..messages.reduction import all_reduce
from .arrays import queue_of, to_array, to_tensor

BUCKET = 2**24
"""Numbers that are added up in one go."""


def refuse(comm: Communicator, reason: str | None) -> None:
    """Raise the same InputError on every rank, where one of them has a reason to. One collective."""
    for rank, text in enumerate(comm.allgather(reason)):
        if text is not None:
            raise InputError(f"on rank {rank}, {text}")


def broadcast(module: torch.nn.Module, comm: Communicator) -> None:
    """Give every rank the weights and buffers of rank 0, to the last bit, by `MPI_Bcast`.

    Parameters
    ----------
    module : torch.nn.Module
        Built alike on every rank.
    comm : mpi4py.MPI.Comm

    Raises
    ------
    InputError
        On every rank, where the modules have other weights, of other shapes or dtypes.
    """
    comm = private(comm)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    outline = repr([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()])
    table = comm.allgather((len(tensors), sum(t.numel() for t in tensors.values()), zlib.crc32(outline.encode())))
    for rank, own in enumerate(table):
        if own != table[0]:
            raise InputError(
                f"the module on rank {rank} has {own[0]} tensors of {own[1]} numbers, on rank 0 {table[0][0]} of "
                f"{table[0][1]}, or others: build the same module on every rank"
            )
    with torch.no_grad():
        for tensor in tensors.values():
            host = to_array(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
            comm.Bcast(Rows(host))
            if comm.Get_rank():
                tensor.copy_(to_tensor(host).view(tensor.dtype).reshape(tensor.shape))


def sum_gradients(module: torch.nn.Module, comm: Communicator) -> None:
    """Add up the gradients of a module's weights over the ranks, in place, once before a step.

    With several micro-batches that is after the last backward: another call adds up again what the first one has
    summed, and nothing finds it.

    Each rank's backward gives the part of its own tokens. They are added up in float32, or in float64 where the
    weights are, by plain messages and in the order of the ranks: the bits are the same with every MPI library. Those
    on CUDA devices are added up there.

    Parameters
    ----------
    module : torch.nn.Module
        The same on every rank; weights that only some ranks have used have a gradient on all of them afterwards.
    comm : mpi4py.MPI.Comm

    Raises
    ------
    InputError
        On every rank, where a gradient is sparse, or the ranks' modules have another number of weights, or theirs
        lie on devices of another kind.
    """
    comm = private(comm)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    sparse = any(weight.grad is not None and weight.grad.is_sparse for weight in weights)
    refuse(comm, "a gradient is sparse: embeddings here take sparse=False" if sparse else None)
    outlines = comm.allgather([(weight.grad is not None, weight.device.type) for weight in weights])
    if len(set(map(len, outlines))) > 1:
        raise InputError(
            f"the ranks have {sorted(set(map(len, outlines)))} weights that take gradients: not one module"
        )
    for rank, outline in enumerate(outlines):
        for (_, own), (_, other) in zip(outline, outlines[0], strict=True):
            if own != other:
                raise InputError(f"a weight is on a {own} device on rank {rank}, on a {other} device on rank 0")
    used = [weight for weight, *by_rank in zip(weights, *outlines, strict=True) if any(has for has, _ in by_rank)]
    for weight in used:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for bucket in buckets([weight.grad for weight in used]):
        dtype = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
        device = bucket[0].device if bucket[0].device.type == "cuda" else "cpu"
        total = torch.cat([gradient.detach().reshape(-1).to(device, dtype) for gradient in bucket])
        with queue_of(total):
            array = to_array(total)
            all_reduce(carrying(comm, namespace(array)), array)
        for gradient, part in zip(bucket, total.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype and device together, in their order, as many as make up a bucket."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        alike = not bucket or (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if not alike or sum(g.numel() for g in bucket) >= BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
