"""GGUF files, as llama.cpp reads them: the header here, the quantised numbers by the library `gguf`.

    "GGUF", version, number of tensors, number of values
    each value:   key, type, value                     strings and arrays begin with their lengths
    each tensor:  name, lengths (innermost first), type, where it begins
    aligned, the tensors' bytes

The header is read here because it is the place to check: no length in it is believed before the file has as many
bytes left, and every tensor must lie within the file (the library's own reader trusts the lengths).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .config import Config
from .optional import library

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Format of each type of value, for `struct`."""
STRING, ARRAY = 8, 9
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Hugging Face's name of each kind of weight."""
CONFIG = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}  # fmt: skip
SCALED = "rope.scaling.type", "rope_freqs.weight"
"""Where a context was made longer: not known here."""


class Tensor(NamedTuple):
    """Shape, outermost first, type and place in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


class GGUF:
    """A GGUF file of a Llama.

    Parameters
    ----------
    path : Path

    Raises
    ------
    InputError
        Where the file is damaged, cut, or of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self.at = 0
        magic, version, tensors, values = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise InputError(f"{path} is no GGUF file of version 2 or 3, little-endian")
        self.values = {self.string(): self.value(*self.numbers("I")) for _ in range(values)}
        found = {self.string(): self.tensor() for _ in range(tensors)}
        alignment = self.values.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in found.items():
            if start + tensor.begin + tensor.nbytes > len(self.data):
                raise InputError(f"{path} is cut: {name} ends beyond its {len(self.data)} bytes")
            self.tensors[renamed(name)] = tensor._replace(begin=start + tensor.begin)
        self.config = self.configured()

    def configured(self) -> Config:
        """Return the model's sizes."""
        kind = self.values.get("general.architecture")
        if kind != "llama":
            raise InputError(f"{self.path} is a model of the architecture {kind!r}, not a llama")
        if scaled := [name for name in SCALED if f"llama.{name}" in self.values or name in self.tensors]:
            raise InputError(f"{self.path} has {scaled[0]}: take the Hugging Face folder of this model")
        given = {name: self.values.get(f"llama.{key}") for name, key in CONFIG.items()}
        table = self.tensors.get("model.embed_tokens.weight")
        given |= {
            "model_type": "llama", "vocab_size": table.shape[0] if table else None,
            "bos_token_id": self.values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.values.get("tokenizer.ggml.eos_token_id"),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
        }  # fmt: skip
        try:
            return Config.from_json({name: value for name, value in given.items() if value is not None})
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of the file by its name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Array:
        """Return a weight in float32.

        llama.cpp turns neighbouring features of Q and K where Hugging Face turns those half a head apart: their rows
        are put back in the latter order.
        """
        gguf = library("gguf")
        shape, kind, begin, nbytes = self.tensors[name]
        rows = self.data[begin : begin + nbytes].reshape(*shape[:-1], -1)
        weight: Array = gguf.dequantize(rows, gguf.GGMLQuantizationType(kind)).astype(np.float32, copy=False)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = weight.reshape(-1, self.config.head_dim // 2, 2, shape[-1])  # (heads, pairs, 2, in)
            weight = pairs.swapaxes(1, 2).reshape(shape)
        return weight

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self.data) - self.at:
            raise InputError(f"{self.path} is cut or damaged: {count} bytes at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Return the next numbers."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> str:
        """Return the next string."""
        return self.take(*self.numbers("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return the next value, of a type."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.numbers("IQ")
            if kind in SCALARS:
                return np.frombuffer(self.take(count * struct.calcsize(SCALARS[kind])), "<" + SCALARS[kind]).tolist()
            if kind == STRING:
                return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise InputError(f"{self.path} is damaged: a value of type {kind} at {self.at}")
        return self.numbers(SCALARS[kind])[0]

    def tensor(self) -> Tensor:
        """Return where the next tensor lies, counted from the start of all."""
        sizes = library("gguf").GGML_QUANT_SIZES
        (axes,) = self.numbers("I")
        if not 1 <= axes <= 4:
            raise InputError(f"{self.path} is damaged: a tensor of {axes} axes at {self.at}")
        *lengths, kind, begin = self.numbers("Q" * axes + "IQ")
        if kind not in sizes:
            raise InputError(f"{self.path} is damaged: a tensor of type {kind} at {self.at}")
        block, nbytes = sizes[kind]
        if lengths[0] % block:
            raise InputError(f"{self.path} is damaged: rows of {lengths[0]} numbers in blocks of {block}")
        return Tensor(tuple(reversed(lengths)), kind, begin, math.prod(lengths) // block * nbytes)


def renamed(name: str) -> str:
    """Return Hugging Face's name of a weight; what has none keeps its own."""
    *block, kind, suffix = ("", *name.rsplit(".", 2)) if name.count(".") < 2 else name.rsplit(".", 2)
    if kind not in NAMES or suffix != "weight":
        return name
    number = block[0].removeprefix("blk.") if block and block[0] else ""
    return f"model.layers.{number}.{NAMES[kind]}.weight" if number else f"{NAMES[kind]}.weight"
