"""Plan of a training run, from its TOML file: the model's sizes, and how it is trained."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..machines.reading import content
from .config import Config, check_sizes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BYTES = 256
"""The vocabulary: a token is a byte of the text."""
DTYPES = ("float32", "float64", "bfloat16")
COUNTS = "steps", "tokens", "batch"
POSITIVE = "learning_rate", "eps", "clip"


@dataclass(frozen=True)
class Plan:
    """The training of a model on a text.

    Attributes
    ----------
    model : Config
    steps : int
    tokens : int
        Length of a sequence; it is what the ranks of a row share out.
    batch : int
        Sequences a step, of all ranks together.
    learning_rate : float
        The highest one, after `warmup` steps; from there it falls by a cosine to `lowest` of it at the last step.
    beta1, beta2, eps, weight_decay : float
        Of AdamW; matrices decay, norms do not.
    clip : float
        The norm of all gradients together is at most this.
    seed : int
        Of the first weights and of the choice of sequences.
    dtype : {"float32", "float64", "bfloat16"}
        Of activations. With bfloat16, weights, their gradients' sums and AdamW's means are float32, and what is
        computed with is the weights rounded.
    recompute : bool
        Whether a block's activations are computed again in backward, instead of kept.
    held_out : float
        Share of the text, at its end, that is validated on and not trained on.
    """

    model: Config
    steps: int = 200
    tokens: int = 256
    batch: int = 4
    learning_rate: float = 3e-3
    lowest: float = 0.1
    warmup: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    recompute: bool = False
    held_out: float = field(default=0.1)

    def __post_init__(self) -> None:
        check_sizes({name: getattr(self, name) for name in COUNTS})
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is a number above 0, got {getattr(self, name)!r}")
        for name in ("beta1", "beta2", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is 0 or more and less than 1, got {getattr(self, name)!r}")
        if not 0 <= self.lowest <= 1:
            raise InputError(f"lowest is a number from 0 to 1, got {self.lowest!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: choose from {', '.join(DTYPES)}")
        if self.warmup < 0 or not 0 <= self.weight_decay < math.inf or self.seed < 0:
            raise InputError("warmup, weight_decay and seed are numbers, at least 0")
        if self.tokens > self.model.max_position_embeddings:
            raise InputError(f"tokens {self.tokens} are more than max_position_embeddings of the model")

    @classmethod
    def from_toml(cls, path: Path) -> Plan:
        """Return what a file says; an InputError names a key that is not known, and the nearest that is."""
        try:
            given = tomllib.loads(content(path).decode("utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is no TOML file: {error}") from None
        try:
            return cls.from_tables(given)
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_tables(cls, given: Mapping[str, Any]) -> Plan:
        """Return what the tables [model] and [training] say."""
        known("table", given, {"model", "training"})
        for name, table in given.items():
            if not isinstance(table, Mapping):
                raise InputError(f"[{name}] is a table of names and values, got {table!r}")
        model, training = dict(given.get("model", {})), dict(given.get("training", {}))
        own = {item.name for item in fields(Config)} - {"vocab_size", "bos_token_id", "eos_token_id"}
        known("key of [model]", model, own)
        known("key of [training]", training, {item.name for item in fields(cls)} - {"model"})
        for item in fields(cls):
            kind = type(item.default)
            if item.name in training and item.name != "model":
                training[item.name] = typed(item.name, training[item.name], kind)
        model = {"tie_word_embeddings": True, "max_position_embeddings": training.get("tokens", cls.tokens), **model}
        return cls(Config.from_json({"model_type": "llama", "vocab_size": BYTES, **model}), **training)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (self.lowest + (1 - self.lowest) * (1 + math.cos(math.pi * min(done, 1))) / 2)

    def to_tables(self) -> dict[str, Any]:
        """Return the tables that `from_tables` makes this plan of."""
        training = {name: value for name, value in asdict(self).items() if name != "model"}
        skipped = "vocab_size", "bos_token_id", "eos_token_id", "architectures", "model_type", "hidden_act"
        model = {name: value for name, value in self.model.to_json().items() if name not in skipped}
        return {"model": {name: value for name, value in model.items() if value is not None}, "training": training}


def known(what: str, given: Mapping[str, object], names: set[str]) -> None:
    """Raise InputError where a key is not one of these."""
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(sorted(names))}"
            raise InputError(f"unknown {what} {key!r}{hint}")


def typed(name: str, value: Any, kind: type) -> Any:
    """Return a value of a kind, or raise InputError; an integer is a number, too."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is of the type {kind.__name__}, got {value!r}")
    return value
