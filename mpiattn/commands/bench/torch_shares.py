"""Ways to share out the tokens of a training step in torch: algorithms of this package, and torch's own."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import torch as bridge
from ...algorithms import Attention
from ...messages.message import Communicator
from .quiet import silence
from .torch_llama import Attend
from .torch_parallel import start


@dataclass(frozen=True)
class Share:
    """Part of a rank in a sequence: where its tokens lie, and what meets those of the other ranks."""

    positions: Tensor
    """int64, (this rank's tokens,)"""
    attend: Attend
    sum_gradients: Callable[[], None]
    silence: Callable[[], None] | None = None
    """Leaves out the messages of attention from now on."""


@contextlib.contextmanager
def algorithm(
    comm: Communicator, model: nn.Module, tokens: int, device: torch.device, build: Callable[[], Attention]
) -> Iterator[Share]:
    """Share out a sequence by an algorithm of this package, with a causal mask."""
    with build() as attention:
        positions = torch.as_tensor(attention.positions(tokens), device=device)
        add_up = partial(bridge.sum_gradients, model, comm)
        yield Share(positions, partial(bridge.attention, attention), add_up, partial(silence, attention))


@contextlib.contextmanager
def context_parallel(
    comm: Communicator, model: nn.Module, tokens: int, device: torch.device, rotation: str
) -> Iterator[Share]:
    """Share out a sequence by torch's context parallelism, balanced as it does by default; on one rank, not at all."""
    positions = torch.arange(tokens, device=device)
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        if comm.Get_size() > 1:
            start(comm, "nccl" if device.type == "cuda" else "gloo")
            context = importlib.import_module("torch.distributed.tensor.experimental._attention")
            mesh = dist.device_mesh.init_device_mesh(device.type, (comm.Get_size(),))
            context.set_rotate_method(rotation)
            around = context.context_parallel(
                mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions}
            )
            stack.enter_context(around)  # `positions` are this rank's inside
        yield Share(positions, dot_product, partial(sum_gradients, model, comm))


def dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by torch's function, which its context parallelism replaces; it knows no K and V of fewer heads."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def sum_gradients(model: nn.Module, comm: Communicator) -> None:
    """Add up the gradients over the ranks by torch's all-reduce, in the dtype of the weights."""
    if comm.Get_size() > 1:
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
