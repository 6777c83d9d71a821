"""Prefill and decoding of SmolLM2-135M beside transformers: one process, one thread, float32, the same weights.

python benchmarks/models/speed.py [--rounds 3]

Rounds take turns, the best of each is shown; times are of the CPU, as other jobs may share the cores. transformers is
called as its own loop calls it: the prompt with a cache and the logits of the last token, then one token after
another, the most probable one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers
from mpi4py import MPI
from tabulate import tabulate

import mpiattn
from mpiattn.models.generation import Generator
from mpiattn.models.model import Model

NEW = 32


def ours(model: Model, prompt: list[int]) -> Callable[[], tuple[float, float, list[int]]]:
    """Return a function that generates: seconds of the prompt and of a new token, and the tokens."""
    attention = mpiattn.RingAttention(MPI.COMM_SELF, mask=mpiattn.Causal())
    generator = Generator(model.llama, attention)

    def once() -> tuple[float, float, list[int]]:
        tokens, times = [], [time.process_time()]
        for token in generator.generate(prompt, NEW + 1):
            tokens.append(token)
            times.append(time.process_time())
        return times[1] - times[0], (times[-1] - times[1]) / (len(tokens) - 1), tokens

    return once


def theirs(model: Any, prompt: list[int]) -> Callable[[], tuple[float, float, list[int]]]:
    """Return the same of transformers."""

    @torch.no_grad()
    def once() -> tuple[float, float, list[int]]:
        tokens, times, ids = [], [time.process_time()], torch.tensor([prompt])
        cache = transformers.DynamicCache(config=model.config)
        for _ in range(NEW + 1):
            logits = model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
            times.append(time.process_time())
            ids = torch.tensor([tokens[-1:]])
        return times[1] - times[0], (times[-1] - times[1]) / NEW, tokens

    return once


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    model = Model(MPI.COMM_SELF, "smollm2")
    sizes = {key: value for key, value in model.config.to_json().items() if value is not None}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    weights = {name: torch.from_numpy(weight) for name, weight in model.llama.weights.items()}
    other.load_state_dict({name: weight.contiguous() for name, weight in weights.items()}, strict=False)
    other.tie_weights()
    text = np.random.default_rng(0).integers(17, 49152, 4096).tolist()
    rows = []
    for length in (128, 2048):
        runs = ours(model, text[:length]), theirs(other, text[:length])
        table = [[run() for run in runs] for _ in range(rounds)]
        assert all(mine[2] == right[2] for mine, right in table), "other tokens than transformers'"
        for place, name in enumerate(("prefill", "a new token")):
            mine, right = (min(row[who][place] for row in table) for who in (0, 1))
            rows.append([length, name, f"{mine * 1e3:.1f}", f"{right * 1e3:.1f}", f"{right / mine:.2f}"])
    print(f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        tabulate(
            rows,
            headers=["tokens before", "", "mpiattn CPU ms", "transformers CPU ms", "times as fast"],
            disable_numparse=True,
        )
    )


if __name__ == "__main__":
    main()
