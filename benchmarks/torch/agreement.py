"""What it saves that the layers of a batch agree once, and not each; see README.md here."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from mpi4py import MPI
from transformers import LlamaConfig, LlamaForCausalLM

import mpiattn.torch
from mpiattn.algorithms.agreement import Agreement

TOKENS, ROUNDS = 512, 7
comm = MPI.COMM_WORLD
torch.set_num_threads(1)
sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 1024}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))
ids = torch.arange(TOKENS)[None] % 1000
trust = Agreement.trust


def step(sharded: Any) -> float:
    """Return the seconds of a forward and a backward pass."""
    comm.Barrier()
    start = time.perf_counter()
    sharded(ids, labels=ids).loss.backward()
    comm.Barrier()
    return time.perf_counter() - start


with mpiattn.torch.shard(model, comm) as sharded:
    times: dict[str, list[float]] = {"once": [], "each": []}
    for _ in range(ROUNDS + 1):
        for name, seconds in times.items():
            Agreement.trust = trust if name == "once" else lambda self, batch: None  # type: ignore[method-assign]
            seconds.append(step(sharded))
    agreement = sharded.attention(mpiattn.Causal()).agreement
    start = time.perf_counter()
    for _ in range(1000):
        agreement.describe(numbers=range(30))
    one = (time.perf_counter() - start) / 1000
if comm.Get_rank() == 0:
    once, each = (1e3 * statistics.median(seconds[1:]) for seconds in times.values())
    print(f"{comm.Get_size()} ranks, 30 layers, {TOKENS} tokens: forward and backward", end=" ")
    print(f"{once:.1f} ms where layers agree once, {each:.1f} ms where each agrees;", end=" ")
    print(f"one agreement alone takes {one * 1e6:.0f} us")
