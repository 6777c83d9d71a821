"""What the function of autograd costs beside the calls that it makes; see README.md here."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from mpi4py import MPI

import mpiattn
import mpiattn.torch
from mpiattn.torch.arrays import queue_of, to_array

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--rounds", type=int, default=21)
args = parser.parse_args()

comm = MPI.COMM_WORLD
on_gpu = args.device == "cuda"
CALLS = 4 if on_gpu else 1
if on_gpu:
    mpiattn.use_gpu(comm)
dtype = torch.bfloat16 if on_gpu else torch.float32
torch.set_num_threads(1)
attention = mpiattn.RingAttention(comm, mask=mpiattn.Causal())
tokens = len(attention.positions(args.tokens))
shape = 1, args.heads, tokens, 64
q, k, v = (torch.randn(shape, device=args.device).to(dtype).requires_grad_() for _ in range(3))
d_out = torch.randn(shape, device=args.device).to(dtype)
d_array = to_array(d_out)


def arrays() -> None:
    """Go forward and backward with arrays."""
    with queue_of(q):
        attention.backward(d_array, attention.forward(*map(to_array, (q, k, v)))[1])


def tensors() -> None:
    """Go forward and backward with tensors."""
    torch.autograd.grad(mpiattn.torch.attention(attention, q, k, v), (q, k, v), d_out)


inside = 0.0


def clocked(method: Any) -> Any:
    """Return a method that adds the time it takes to `inside`."""

    def call(*args: Any, **options: Any) -> Any:
        global inside
        start = time.perf_counter()
        result = method(*args, **options)
        inside += time.perf_counter() - start
        return result

    return call


def outside() -> float:
    """Return the seconds that a call of `tensors` spends outside of the algorithm, autograd included."""
    global inside
    inside = 0.0
    return seconds(tensors) - inside / CALLS


def seconds(run: Any) -> float:
    """Return the seconds that a call takes; on a GPU, until it is queued."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    took = (time.perf_counter() - start) / CALLS
    if on_gpu:
        torch.cuda.synchronize()
    return took


seconds(arrays), seconds(tensors)
rounds = [(seconds(arrays), seconds(tensors)) for _ in range(args.rounds)]
alone, bridged = (comm.allreduce(statistics.median(times), MPI.MAX) for times in zip(*rounds, strict=True))
if comm.Get_rank() == 0:
    print(f"{args.tokens} tokens, {args.heads} heads of 64, {dtype}, {comm.Get_size()} ranks, {args.device}")
    print(f"arrays {alone * 1e3:.3f} ms  tensors {bridged * 1e3:.3f} ms", end="  ")
    print(f"ratio {bridged / alone:.3f}  difference {(bridged - alone) * 1e6:.0f} us for forward and backward")
attention.forward, attention.backward = map(clocked, (attention.forward, attention.backward))  # type: ignore[method-assign]
between = comm.allreduce(statistics.median(outside() for _ in range(args.rounds)), MPI.MAX)
if comm.Get_rank() == 0:
    print(f"of tensors' time {between * 1e6:.0f} us outside of the algorithm: {between / bridged:.2%}")
attention.free()
