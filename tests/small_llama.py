"""A small Llama with random weights, for tests."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mpiattn.arrays import Array
from mpiattn.models.config import Config
from mpiattn.models.llama import Llama, initial

CONFIG = Config(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=4, max_position_embeddings=64, rope_theta=100.0,
)  # fmt: skip

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
"""The [model] of a training run."""


def llama(config: Config = CONFIG, dtype: Any = np.float64) -> Llama:
    """Return the model; its weights are large enough that its output depends on every token."""
    weights = {name: 8 * weight if weight.ndim == 2 else weight for name, weight in initial(config, 0, dtype).items()}
    return Llama(config, weights)


def toml(**training: Any) -> str:
    """Return the config of a training run of TINY."""
    tables = (f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
              for name, table in (("model", TINY), ("training", training)))  # fmt: skip
    return "".join(tables)


def tokens(count: int, batch: int = 1) -> Array:
    """Return random tokens, (batch, count)."""
    return np.random.default_rng(count).integers(0, CONFIG.vocab_size, (batch, count))
