"""The matrix of cases, and what the oracle makes of each."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

import numpy as np

from .. import arrays
from ..arrays import Array
from ..errors import InputError
from ..machines.reading import check_memory
from ..problems.dropout import Dropout
from ..problems.layout import LAYOUTS
from ..problems.scalars import whole
from . import oracle
from .user_masks import parse


@dataclass(frozen=True)
class Case:
    """One problem of the matrix; `str` gives it as text."""

    layout: str = "zigzag"
    mask: str = "causal"
    tokens: int = 37
    kv_tokens: int | None = None
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    v_head_dim: int = 8
    dtype: str = "float64"
    scale: float | None = None
    peak: float = 0
    """Magnitude of the logits, by one large component that queries and keys share."""
    softcap: float | None = None
    partials: str = "wide"
    dropout: float = 0
    sinks: bool = False
    scalars: bool = False
    """Whether numbers are given as NumPy's."""
    seed: int = 0

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "seed=0"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return the case that `str` gives as this text."""
        types = get_type_hints(cls)
        values: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in types:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(types)}")
            if types[name] is bool and value not in ("True", "False"):
                raise argparse.ArgumentTypeError(f"{name} is True or False, got {value!r}")
            convert = next(kind for kind in (*get_args(types[name]), types[name]) if kind is not type(None))
            try:
                values[name] = value == "True" if convert is bool else convert(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{name} is a number ({convert.__name__}), got {value!r}") from None
        return cls(**values)

    def check(self) -> None:
        """Raise InputError where there is no such problem, or no memory for it."""
        least = {"tokens": 0, "kv_tokens": 0, "batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "v_head_dim": 1}
        for name, number in {**least, "seed": 0}.items():
            if (value := getattr(self, name)) is not None and value < number:
                raise InputError(f"{name} of a case is at least {number}, got {value}")
        if self.heads % self.kv_heads:
            raise InputError(f"heads {self.heads} of a case must be a multiple of kv_heads {self.kv_heads}")
        try:
            arrays.dtype(self.dtype)
            parse(self.mask)
        except ValueError as error:
            raise InputError(str(error)) from None
        check_memory(8 * sum(map(math.prod, self.shapes.values())), str(self))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that the algorithm is built with."""
        options = {"layout": self.layout, "mask": parse(self.mask), "scale": self.scale}
        unusual = {
            name: getattr(self, name) for name in ("softcap", "partials") if getattr(self, name) != getattr(Case, name)
        }
        return self._given({**options, **unusual})

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of `forward` beside q, k, v and sinks."""
        numbers = self._given({"rate": self.dropout, "seed": self.seed})
        return {"dropout": Dropout(**numbers)} if self.dropout else {}

    def _given(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return arguments as the case gives them: numbers as NumPy's where it says so, which are the same numbers."""
        if not self.scalars:
            return values
        numbers = {name: np.int64(value) for name, value in values.items() if whole(value) is not None}
        floats = {name: np.array(value) for name, value in values.items() if isinstance(value, float)}
        return {**values, **numbers, **floats}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the global q, k, v, out."""
        keys = self.tokens if self.kv_tokens is None else self.kv_tokens
        return {
            "q": (self.batch, self.heads, self.tokens, self.head_dim),
            "k": (self.batch, self.kv_heads, keys, self.head_dim),
            "v": (self.batch, self.kv_heads, keys, self.v_head_dim),
            "out": (self.batch, self.heads, self.tokens, self.v_head_dim),
        }

    @property
    def optional(self) -> bool:
        """Whether an implementation may refuse the case."""
        return bool(self.softcap or self.dropout or self.sinks or self.partials != "wide")


MASKS = ("full", "causal", "window=5", "window=9,3", "documents=20,0,3,14+causal", "documents=9,28+window=6,2")
OTHERS = ("prefix=11", "documents=20,0,3,14+chunks=8", "ahead=6+window=99999999999999999999,4")
"""Masks of a user's own, and one that reaches beyond int64."""

SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 64},  # even
    {"tokens": 5},  # fewer tokens than ranks
    {"tokens": 1},
    {"tokens": 0},
    {"heads": 6, "kv_heads": 6, "batch": 2},
    {"heads": 6, "kv_heads": 1},
    {"heads": 3, "kv_heads": 3, "head_dim": 5, "v_head_dim": 11},
    {"scale": 4.0, "peak": 1e4},
    {"dtype": "float32", "head_dim": 16, "v_head_dim": 16, "batch": 2},
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "partials": "narrow", "head_dim": 5, "v_head_dim": 3},
    {"dtype": "float16", "partials": "narrow", "kv_heads": 4},
    {"softcap": 2.0},
    {"sinks": True, "heads": 6, "kv_heads": 3},
    {"dropout": 0.3, "heads": 6, "kv_heads": 3, "batch": 2},
    {"softcap": 30.0, "sinks": True, "dropout": 0.5, "dtype": "float32"},
)


def fast() -> list[Case]:
    """Return a part of the matrix in which every layout, mask and shape occurs."""
    layouts = itertools.cycle(LAYOUTS)
    return [
        *(Case(layout=next(layouts), mask=mask) for mask in MASKS),
        *(Case(layout=next(layouts), mask=MASKS[number % 3], **shape) for number, shape in enumerate(SHAPES)),
        *(Case(layout=next(layouts), mask=mask, dropout=0.2, scale=0.5, scalars=True) for mask in OTHERS),
        Case(layout="contiguous", mask="full", kv_tokens=50),
        Case(layout="striped", mask="full", kv_tokens=3, dtype="float32"),
        # Messages too large for the buffers of an MPI library: they wait for the receiver.
        Case(tokens=2048, heads=2, head_dim=64, v_head_dim=64, dtype="float32"),
    ]


def matrix() -> list[Case]:
    """Return the whole matrix: layouts x masks, and each shape on them that fits."""
    plain = [Case(layout=layout, mask=mask) for layout, mask in itertools.product(LAYOUTS, MASKS + OTHERS)]
    shaped = [
        Case(layout=layout, mask=mask, **shape) for layout, mask, shape in itertools.product(LAYOUTS, MASKS[:4], SHAPES)
    ]
    crossed = [
        Case(layout=layout, mask="full", kv_tokens=tokens) for layout, tokens in itertools.product(LAYOUTS, (0, 3, 50))
    ]
    return plain + shaped + crossed


@functools.lru_cache(maxsize=512)  # the whole matrix
def problem(case: Case) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the global arrays q, k, v, out (its gradient), sinks, and what the oracle makes of them."""
    case.check()
    rng = np.random.default_rng(case.seed)
    given = {name: rng.standard_normal(shape) for name, shape in (case.shapes | {"sinks": (case.heads,)}).items()}
    if case.peak:
        for name in "qk":
            given[name][..., 0] = np.sqrt(case.peak / (case.scale or case.head_dim**-0.5))
    given = {name: array.astype(arrays.dtype(case.dtype)) for name, array in given.items()}
    q, k, v, d_out, sinks = given.values()
    mask = parse(case.mask)
    mask.check(q.shape[2], k.shape[2])
    features: dict[str, Any] = {"softcap": case.softcap, "sinks": sinks if case.sinks else None, **case.given}
    out, lse = oracle.attention(q, k, v, mask, case.scale, **features)
    d_q, d_k, d_v = oracle.gradients(q, k, v, d_out, mask, case.scale, **features)
    right = {"out": out, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    if case.sinks:
        right["d_sinks"] = oracle.sink_gradient(q, k, v, d_out, mask, case.scale, **features)
    return given, right
