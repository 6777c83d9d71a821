"""The sizes of a Llama, under the names they have in Hugging Face's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..problems.scalars import real, whole

UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "sliding_window": None,
               "partial_rotary_factor": 1.0}  # fmt: skip
"""Options of other models of the family, and the one value that this one knows."""
ROPE = {"default": (), "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}  # fmt: skip
"""The known ways to scale rotary embeddings, and the numbers that each needs."""
MOST_LAYERS = 10_000
"""More layers than any model has: their weights are named one by one."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes and constants; see https://huggingface.co/docs/transformers/model_doc/llama for each."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sizes({name: getattr(self, name) for name in SIZES})
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
        if self.num_hidden_layers > MOST_LAYERS:
            raise InputError(f"num_hidden_layers is at most {MOST_LAYERS}, got {self.num_hidden_layers}")
        kind = self.rope_scaling.get("rope_type", "default")
        if kind not in tuple(ROPE):
            raise InputError(f"rope_type {kind!r}: only default, linear and llama3 are known")
        needed = {f"{name} of rope_scaling": self.rope_scaling.get(name) for name in ROPE[kind]}
        for name, value in {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta, **needed}.items():
            if (real(value) or 0) <= 0:
                raise InputError(f"{name} is a number above 0, got {value!r}")
        if kind == "llama3" and not self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"]:
            raise InputError("low_freq_factor of rope_scaling must be less than high_freq_factor")
        for name, ids in {"bos_token_id": (self.bos_token_id,), "eos_token_id": self.eos_token_id}.items():
            if any(whole(one) is None for one in ids if one is not None):
                raise InputError(f"{name} is the number of a token, got {ids[0] if len(ids) == 1 else ids!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise InputError(f"tie_word_embeddings is true or false, got {self.tie_word_embeddings!r}")

    @classmethod
    def from_json(cls, given: object) -> Config:
        """Return what a config.json says, or raise InputError where it is no Llama's."""
        if not isinstance(given, dict) or given.get("model_type") not in ("llama", "mistral"):
            kind = given.get("model_type") if isinstance(given, dict) else given
            raise InputError(f"model_type is {kind!r}: this is a Llama, for llama and mistral without a window")
        parts = [given.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(part, dict) for part in parts):
            raise InputError("rope_scaling and rope_parameters are tables of numbers")
        rope = {**parts[0], **parts[1]}
        for name, known in UNSUPPORTED.items():
            if (value := {**rope, **given}.get(name)) is not None and value != known:
                raise InputError(f"{name} is {value!r}: only {known!r} is known")
        rope = {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
        rope = rope if rope["rope_type"] != "default" else {"rope_theta": rope.get("rope_theta")}
        theta = rope.pop("rope_theta", None)
        taken = {item.name: given[item.name] for item in fields(cls) if given.get(item.name) is not None}
        taken.setdefault("num_key_value_heads", taken.get("num_attention_heads"))
        if missing := [name for name in SIZES if taken.get(name) is None and name != "head_dim"]:
            raise InputError(f"there is no {', '.join(missing)}")
        check_sizes({name: taken[name] for name in SIZES if name in taken})
        if "head_dim" not in taken and taken["hidden_size"] % taken["num_attention_heads"]:
            raise InputError(
                f"hidden_size {taken['hidden_size']} is no multiple of num_attention_heads, and there is no head_dim"
            )
        taken.setdefault("head_dim", taken["hidden_size"] // taken["num_attention_heads"])
        ends = taken.get("eos_token_id", ())
        taken["eos_token_id"] = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
        return cls(**{**taken, "rope_scaling": rope, **({"rope_theta": theta} if theta else {})})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json of such a model."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        own["rope_scaling"] = dict(self.rope_scaling) or None
        own["eos_token_id"] = list(self.eos_token_id) or None
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **own}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        f, wide, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        block = {
            "input_layernorm": (f,), "self_attn.q_proj": (heads, f), "self_attn.k_proj": (kv, f),
            "self_attn.v_proj": (kv, f), "self_attn.o_proj": (f, heads), "post_attention_layernorm": (f,),
            "mlp.gate_proj": (wide, f), "mlp.up_proj": (wide, f), "mlp.down_proj": (f, wide),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, f)}
        for number in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
        head = {} if self.tie_word_embeddings else {"lm_head.weight": (self.vocab_size, f)}
        return shapes | {"model.norm.weight": (f,)} | head

    @cached_property
    def side_by_side(self) -> list[tuple[str, ...]]:
        """The names of `shapes`, in their order; those of matrices that are multiplied with the same rows together."""
        groups: list[tuple[str, ...]] = []
        for name in self.shapes:
            joins = name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight"))  # with those before
            groups = [*groups[:-1], (*groups[-1], name)] if joins else [*groups, (name,)]
        return groups

    @cached_property
    def frequencies(self) -> NDArray[np.float32]:
        """Radians a token by which each pair of features is turned: (head_dim / 2,).

        Scaled for longer contexts: all alike (linear), or as Llama 3.1, only those that turn less than
        `high_freq_factor` times within the context of the first training, fully below `low_freq_factor`.
        """
        pairs = np.arange(0, self.head_dim, 2) / self.head_dim
        plain = (1 / self.rope_theta**pairs).astype(np.float32).astype(np.float64)
        scaling = self.rope_scaling
        if scaling.get("rope_type", "default") == "linear":
            plain = plain / scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = np.clip((turns - low) / (high - low), 0, 1)
            plain = plain * (kept + (1 - kept) / scaling["factor"])
        return plain.astype(np.float32)


def check_sizes(sizes: Mapping[str, object]) -> None:
    """Raise InputError where one of these is no size."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is an integer above 0, got {value!r}")
