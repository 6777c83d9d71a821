"""Torch's context parallelism, and its attention on one GPU, for `mpiattn bench attention`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ...messages.message import Communicator
from ...problems.mask import Causal
from . import torch_flash4
from .contenders import Contender, Setting

Tensor = Any  # torch's, which is imported where there is one
ROTATIONS = ("allgather", "alltoall")
"""How torch's context parallelism can send K and V."""


def torch_contenders(setting: Setting) -> list[Contender]:
    """Return torch's context parallelism, and its attention on one GPU."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    comm = setting.comm
    torch.cuda.set_device(setting.xp.cuda.Device().id)
    size, heads, dim = comm.Get_size(), setting.heads, setting.head_dim
    causal = isinstance(setting.mask, Causal)

    def random(tokens: int) -> Any:
        return torch.randn(1, heads, tokens, dim, device="cuda", dtype=getattr(torch, np.dtype(setting.dtype).name))

    def passes(by: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
        def forward() -> Tensor:
            with torch.no_grad(), sdpa_kernel(by):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        gradient: Any = None

        def both() -> None:
            nonlocal gradient
            with sdpa_kernel(by):
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
                if gradient is None:
                    gradient = torch.randn_like(out)
                out.backward(gradient)
            q.grad = k.grad = v.grad = None

        return {"forward": forward, "forward+backward": both}

    @contextlib.contextmanager
    def trained(name: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[None]:
        for part in (q, k, v):
            part.requires_grad_(name != "forward")
        yield
        for part in (q, k, v):
            part.requires_grad_(False)

    start(comm, "nccl")
    context = importlib.import_module("torch.distributed.tensor.experimental._attention")
    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (size,))
    whole = [random(setting.tokens) for _ in "qkv"]

    @contextlib.contextmanager
    def parallel(name: str, method: str) -> Iterator[None]:
        context.set_rotate_method(method)
        with context.context_parallel(mesh, buffers=list(whole), buffer_seq_dims=[2, 2, 2]), trained(name, *whole):
            yield

    near = [random(setting.tokens // size) for _ in "qkv"]
    fraction = size * 4.0 * (setting.tokens // size) ** 2 * heads * dim / (2 if causal else 1) / setting.operations
    kernels = {"": SDPBackend.CUDNN_ATTENTION}
    if all(comm.allgather(torch_flash4.offered())):
        kernels[torch_flash4.LABEL] = SDPBackend.FLASH_ATTENTION
    return [
        *(
            Contender(
                f"torch context_parallel, {method}{label}",
                passes(by, *whole),
                around=partial(parallel, method=method),
            )
            for label, by in kernels.items()
            for method in ROTATIONS
            if size > 1
        ),
        *(
            Contender(f"torch one GPU{label}", passes(by, *near), fraction, around=lambda name: trained(name, *near))
            for label, by in kernels.items()
        ),
    ]


def start(comm: Communicator, backend: str) -> None:
    """Start torch's own messages among the ranks, unless they have started; "nccl" takes each rank's current GPU."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    size, rank = comm.Get_size(), comm.Get_rank()
    with socket.socket() as free:
        free.bind(("", 0))
        port = comm.bcast(free.getsockname()[1])
    host = comm.bcast(socket.gethostname())
    alone = all(comm.allgather(host == socket.gethostname()))
    os.environ |= {"MASTER_ADDR": "127.0.0.1" if alone else host, "MASTER_PORT": str(port)}
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    dist.init_process_group(backend, rank=rank, world_size=size, device_id=device)
