"""Attention on all ranks: speed, and how much of the messages is not hidden behind the compute.

In rounds in which all take turns, each algorithm is measured beside

  without messages       the same calls with the messages left out: what is lost against it is exposed communication
  one call               one kernel call, a rank's queries against its own keys unmasked, looped on all ranks at once
  torch context_parallel torch's own, with cuDNN, by all-gather and by all-to-all  (where torch finds the GPUs)
  torch one GPU          torch's attention of a rank's share alone, looped on all ranks at once

Times are the slowest rank's; speeds count the products that the mask leaves: 4 pairs * heads * head_dim operations
forward, 2.5 times as many backward. A fraction is a median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from . import arrays, device, gpu, grid, inputs, kernels
from .algorithms import ALGORITHMS, Attention
from .mask import Causal, Full, Mask, pairs
from .message import Communicator, InputError
from .problem import PARTIALS
from .softmax import accumulator

PASSES = ("forward", "forward+backward")
WORK = {"forward": 1.0, "forward+backward": 3.5}
LEAST = 0.05  # seconds that a timing takes, by as many calls as that needs


class Nothing:
    """A request for a message that nobody sends."""

    @staticmethod
    def Waitall(requests: Any) -> None:
        """Wait for nothing."""

    @staticmethod
    def Testall(requests: Any) -> bool:
        """Say that nothing is left to wait for."""
        return True


class Quiet:
    """A communicator that moves nothing but what ranks agree on."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Isend(self, *arguments: Any) -> Nothing:
        """Send nothing."""
        return Nothing()

    Irecv = Iallgatherv = Ireduce_scatter = Isend

    def Allgatherv(self, *arguments: Any) -> None:
        """Gather nothing."""

    Alltoallv = Allreduce = Allgatherv


def silence(attention: Attention) -> None:
    """Leave out the messages of an algorithm from now on."""
    for name, value in list(vars(attention).items()):
        if isinstance(value, Attention):
            silence(value)
        elif hasattr(value, "Isend"):
            setattr(attention, name, Quiet(value))


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

    def measure(self, name: str, comm: Communicator, wait: Callable[[], None]) -> float:
        """Return the seconds of one call, of the slowest rank."""
        run = self.run[name]
        with self.around(name):
            run()
            if name not in self.calls:
                self.calls[name] = max(math.ceil(LEAST / _timed(run, 1, comm, wait)), 2)
            return _timed(run, self.calls[name], comm, wait)


def _timed(run: Callable[[], object], calls: int, comm: Communicator, wait: Callable[[], None]) -> float:
    wait()
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    slowest: float = max(comm.allgather(time.perf_counter() - start))
    return slowest / calls


@dataclass
class Setting:
    """The problem, and this rank's means to compute it."""

    comm: Communicator
    xp: Any
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    mask: Mask
    options: dict[str, Any]

    def random(self, heads: int, tokens: int) -> Any:
        """Return random numbers, (1, heads, tokens, head_dim)."""
        shape = (1, heads, tokens, self.head_dim)
        if self.xp is np:
            return np.random.default_rng().standard_normal(shape).astype(self.dtype)
        return arrays.cast(self.xp.random.standard_normal(shape, dtype=np.float32), self.dtype)

    def wait(self) -> None:
        """Wait until the device has nothing more to do."""
        gpu.wait(self.xp)

    @property
    def operations(self) -> float:
        """Those of the whole problem, forward."""
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

        def both(attention: Attention = attention, own: Any = own, forward: Any = forward) -> None:
            _, saved = forward()
            attention.backward(own["out"], saved)

        suffix = " without messages" if quiet else ""
        result.append(Contender(label + suffix, {"forward": forward, "forward+backward": both}))
    return result


def _size(index: Any, shape: tuple[int, ...]) -> tuple[int, int]:
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
        kernel: Any = attention.kernel
    wide, xp = accumulator(setting.dtype), setting.xp
    where = np.arange(tokens), np.arange(tokens)
    out, lse = xp.zeros(q.shape, wide), xp.full(q.shape[:3], -math.inf, wide)
    row_delta = xp.zeros(q.shape[:3], wide)
    totals = [xp.zeros(array.shape, wide) for array in (q, k, v)]
    final = xp.full(q.shape[:3], math.log(tokens), wide)

    def forward() -> None:
        kernel.forward(q, k, v, *where, out, lse)

    def both() -> None:
        forward()
        kernel.backward(q, k, v, d_out, final, row_delta, *where, *totals)

    pieces = setting.comm.Get_size() * 4.0 * tokens**2 * setting.heads * setting.head_dim
    run = {"forward": forward, "forward+backward": both}
    return Contender(
        f"one call, {kernel.name if hasattr(kernel, 'name') else 'numpy'}", run, pieces / setting.operations
    )


# torch


def torch_contenders(setting: Setting) -> list[Contender]:
    """Return torch's context parallelism, and its attention on one GPU."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    comm = setting.comm
    torch.cuda.set_device(setting.xp.cuda.Device().id)
    size, rank, heads, dim = comm.Get_size(), comm.Get_rank(), setting.heads, setting.head_dim
    causal = isinstance(setting.mask, Causal)

    def random(tokens: int) -> Any:
        return torch.randn(1, heads, tokens, dim, device="cuda", dtype=getattr(torch, np.dtype(setting.dtype).name))

    def passes(q: Any, k: Any, v: Any) -> dict[str, Callable[[], object]]:
        def forward() -> Any:
            with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        gradient: Any = None

        def both() -> None:
            nonlocal gradient
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
                if gradient is None:
                    gradient = torch.randn_like(out)
                out.backward(gradient)
            q.grad = k.grad = v.grad = None

        return {"forward": forward, "forward+backward": both}

    @contextlib.contextmanager
    def trained(name: str, q: Any, k: Any, v: Any) -> Iterator[None]:
        for part in (q, k, v):
            part.requires_grad_(name != "forward")
        yield
        for part in (q, k, v):
            part.requires_grad_(False)

    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("", 0))
            port = comm.bcast(free.getsockname()[1])
        host = comm.bcast(socket.gethostname())
        alone = all(comm.allgather(host == socket.gethostname()))
        os.environ |= {"MASTER_ADDR": "127.0.0.1" if alone else host, "MASTER_PORT": str(port)}
        dist.init_process_group(
            "nccl", rank=rank, world_size=size, device_id=torch.device("cuda", torch.cuda.current_device())
        )
    context = importlib.import_module("torch.distributed.tensor.experimental._attention")
    mesh = dist.device_mesh.init_device_mesh("cuda", (size,))
    whole = [random(setting.tokens) for _ in "qkv"]

    @contextlib.contextmanager
    def parallel(name: str, method: str) -> Iterator[None]:
        context.set_rotate_method(method)
        with context.context_parallel(mesh, buffers=list(whole), buffer_seq_dims=[2, 2, 2]), trained(name, *whole):
            yield

    near = [random(setting.tokens // size) for _ in "qkv"]
    fraction = size * 4.0 * (setting.tokens // size) ** 2 * heads * dim / (2 if causal else 1) / setting.operations
    return [
        *(
            Contender(f"torch context_parallel, {method}", passes(*whole), around=partial(parallel, method=method))
            for method in ("allgather", "alltoall")
            if size > 1
        ),
        Contender("torch one GPU", passes(*near), fraction, around=lambda name: trained(name, *near)),
    ]


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench attention`."""
    parser.add_argument(
        "--algorithms", default="ring,mesh", metavar="NAME,...", help="default ring,mesh; mesh:1x4 sets the grid"
    )
    parser.add_argument("--tokens", default="", metavar="N,...", help="default 16384,65536 on GPUs, else 2048")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="default as many as query heads")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--dtype", help="default bfloat16 on GPUs, else float32")
    parser.add_argument("--mask", type=inputs.mask, default=Causal(), help=inputs.MASK_HELP)
    parser.add_argument("--layout", help="default zigzag with a causal mask, else contiguous")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default 7")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing")
    parser.add_argument("--partials", choices=PARTIALS, default="wide", help="how partial sums travel (default wide)")
    gpu.add_arguments(parser, "cupy if there is a GPU")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and print on rank 0."""
    xp = gpu.namespace(args, comm, "cupy" if arrays.gpus() else "numpy")
    on_gpu = xp is not np
    dtype = arrays.dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))
    lengths = [int(text) for text in (args.tokens or ("16384,65536" if on_gpu else "2048")).split(",")]
    options = {"layout": args.layout, "partials": args.partials, **gpu.options(args)}

    def say(*lines: str, sep: str = " ") -> None:
        if comm.Get_rank() == 0:
            print(*lines, sep=sep, flush=True)

    say("command:", " ".join(["mpiattn", *sys.argv[1:]]))
    say("machine:", *describe(comm, xp), sep="\n  ")
    report: list[dict[str, Any]] = []
    for tokens in lengths:
        kv_heads = args.kv_heads or args.heads
        setting = Setting(comm, xp, tokens, args.heads, kv_heads, args.head_dim, dtype, args.mask, options)
        contenders = []
        for text in args.algorithms.split(","):
            name, _, shape = text.partition(":")
            if name not in ALGORITHMS:
                raise InputError(f"unknown algorithm {name!r}: choose from {', '.join(ALGORITHMS)}")
            rows, cols = grid.parse(shape) if shape else (None, None)
            contenders += algorithm(setting, text, name, {"rows": rows, "cols": cols} if shape else {})
        contenders.append(one_call(setting))
        if on_gpu and not args.no_torch and importlib.util.find_spec("torch") and kv_heads == args.heads:
            contenders += torch_contenders(setting)
        for name, _, contender in itertools.product(PASSES, range(args.rounds), contenders):
            contender.seconds[name].append(contender.measure(name, comm, setting.wait))
        say(
            f"\n{tokens} tokens, {args.heads} heads of {args.head_dim}, {dtype.name}, {args.mask}, "
            f"{comm.Get_size()} ranks"
        )
        say(table(setting, contenders))
        task = {"tokens": tokens, "ranks": comm.Get_size(), "heads": args.heads, "kv_heads": kv_heads}
        task |= {"head_dim": args.head_dim, "dtype": dtype.name, "mask": str(args.mask), "partials": args.partials}
        report += [{**task, "name": c.name, "seconds": c.seconds} for c in contenders]
        del contenders
        if on_gpu:
            xp.get_default_memory_pool().free_all_blocks()
    if args.json and comm.Get_rank() == 0:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def describe(comm: Communicator, xp: Any) -> list[str]:
    """Return what this runs on, a line each."""
    from mpi4py import MPI

    what = [MPI.Get_library_version().splitlines()[0].split(",")[0].strip("\0 ")]
    if xp is not np:
        name = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()
        shared = {(host, number) for host, number in comm.allgather((socket.gethostname(), xp.cuda.Device().id))}
        what.insert(0, f"{len(shared)} x {name}, {comm.Get_size()} ranks")
        what += [f"CuPy {xp.__version__}", kernels.on_gpus()]
        what.append(f"messages of device memory: {'yes' if device.takes_device_memory(comm, xp) else 'no'}")
    return what


def table(setting: Setting, contenders: list[Contender]) -> str:
    """Return the speeds and fractions as a table."""
    by_name = {contender.name: contender for contender in contenders}
    torch = [contender for contender in contenders if contender.name.startswith("torch context_parallel")]
    rows = []
    for contender in contenders:
        row: list[Any] = [contender.name]
        quiet = by_name.get(f"{contender.name} without messages")
        for name in PASSES:
            seconds = contender.seconds[name]
            median = statistics.median(seconds)
            rate = setting.operations * WORK[name] * contender.fraction / setting.comm.Get_size() / median / 1e12
            best = min(torch, key=lambda c: statistics.median(c.seconds[name]), default=None)
            row += [f"{median * 1e3:.3f}", f"{rate:.3g}"]
            row.append(_ratio(quiet.seconds[name], seconds) if quiet else "")
            row.append(_ratio(best.seconds[name], seconds) if best and contender.fraction == 1 else "")
        rows.append(row)
    heads = [
        text
        for name in PASSES
        for text in (f"{name}\nms", "TFLOP/s\nper rank", "of without\nmessages", "x torch\nparallel")
    ]
    return tabulate(rows, headers=["", *heads], disable_numparse=True, colalign=("left", *["right"] * len(heads)))


def _ratio(others: list[float], own: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(others, own, strict=True)):.3f}"
