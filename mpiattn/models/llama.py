"""Llama (Touvron et al. 2023, arXiv 2302.13971), its tokens spread over the ranks: forward and backward.

    x = embedding(tokens)
    for each block:  x = x + W_o attention(rotary(W_q h), rotary(W_k h), W_v h)     h = rms_norm(x)
                     x = x + W_down (silu(W_gate h) * W_up h)                       h = rms_norm(x)
    logits = W_head rms_norm(x)

Each rank has the tokens that the layout gives it, and all weights. Only attention looks at other tokens, so only
there is anything sent: `attend` is given q, k, v of this rank's tokens, (batch, heads, tokens, head_dim), and
returns their rows of the output, as `Attention.forward` does. Weights have their names in Hugging Face's files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array, namespace
from ..problems.mask import Positions
from .config import Config
from .layers import (
    embedding,
    embedding_backward,
    linear,
    linear_backward,
    rms_norm,
    rms_norm_backward,
    rotary,
    rotary_backward,
    swiglu,
    swiglu_backward,
)

FEW = 8
"""Tokens: of more, the parts of a product are better apart in memory."""

Attend = Callable[[int, Array, Array, Array], tuple[Array, Any]]
"""Given the block's number and q, k, v: returns out, and what backward needs."""
AttendBackward = Callable[[Array, Any], tuple[Array, Array, Array]]
"""Given d_out and what `Attend` saved: returns d_q, d_k, d_v."""


class Llama:
    """A Llama of replicated weights.

    Parameters
    ----------
    config : Config
    weights : dict
        NumPy or CuPy arrays by name, of the shapes in `Config.shapes`.
    joined : dict, optional
        The same memory by the names of weights that lie in it side by side: a product of few rows with all of them
        takes less time than with each.
    """

    def __init__(
        self, config: Config, weights: Mapping[str, Array], joined: Mapping[tuple[str, ...], Array] | None = None
    ) -> None:
        self.config, self.weights, self.joined = config, weights, joined or {}
        self.eps = config.rms_norm_eps

    @property
    def head(self) -> Array:
        """The matrix of the logits, (vocabulary, features)."""
        tied = self.config.tie_word_embeddings
        return self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def forward(
        self, tokens: Array, positions: Positions, attend: Attend, tape: list[Any] | None = None,
        recompute: bool = False,
    ) -> Array:  # fmt: skip
        """Return the last hidden states of this rank's tokens, normed: (batch, tokens, features).

        Parameters
        ----------
        tokens : int64, (batch, tokens)
        positions : int64, (tokens,)
            Global ones: `attention.positions(length)`.
        attend : function
            See `Attend`.
        tape : list, optional
            Takes what `backward` needs.
        recompute : bool
            Whether that is no more of a block than its input, from which `backward` computes the rest again.
        """
        angles = self.angles(positions)
        x = embedding(tokens, self.weights["model.embed_tokens.weight"])  # (b, t, f)
        for number in range(self.config.num_hidden_layers):
            before = x
            x, saved = self.block(number, x, angles, attend)
            if tape is not None:
                tape.append((before,) if recompute else saved)
            del saved  # so that the next block has its memory, unless the tape keeps it
        if tape is not None:
            tape.append((tokens, x, angles))
        return rms_norm(x, self.weights["model.norm.weight"], self.eps)

    def logits(self, hidden: Array) -> Array:
        """Return the logits of the next token: (batch, tokens, vocabulary)."""
        return linear(hidden, self.head)

    def block(self, number: int, x: Array, angles: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """Return a block's output, and what `block_backward` needs; x is (b, t, f)."""
        h = rms_norm(x, self.of(number, "input_layernorm"), self.eps)
        qkv = self.products(h, number, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        q, k, v = (to_heads(rows, self.config.head_dim) for rows in qkv)
        out, saved = attend(number, rotary(q, *angles), rotary(k, *angles), v)  # (b, heads, t, d)
        y = linear(to_rows(out), self.of(number, "self_attn.o_proj"))
        y += x
        h = rms_norm(y, self.of(number, "post_attention_layernorm"), self.eps)
        gate, up = self.products(h, number, "mlp.gate_proj", "mlp.up_proj")
        z = linear(swiglu(gate, up), self.of(number, "mlp.down_proj"))
        z += y
        return z, (x, out, saved, y, gate, up)

    def backward(
        self, d_hidden: Array, tape: list[Any], attend: AttendBackward, gradients: dict[str, Array] | None = None,
        again: Attend | None = None,
    ) -> dict[str, Array]:  # fmt: skip
        """Return the gradients of the weights by name: this rank's tokens' share of them, to be added up.

        Parameters
        ----------
        d_hidden : (batch, tokens, features)
            Gradient of what `forward` returned.
        tape : list
            From `forward`; left empty.
        attend : function
            See `AttendBackward`.
        gradients : dict, optional
            Others that these are added to, such as that of the head.
        again : function, optional
            What `forward` was given as `attend`, where blocks are computed again.
        """
        gradients = {} if gradients is None else gradients
        tokens, x, angles = tape.pop()
        d_x, d_weight = rms_norm_backward(d_hidden, x, self.weights["model.norm.weight"], self.eps)
        add(gradients, "model.norm.weight", d_weight)
        for number in reversed(range(self.config.num_hidden_layers)):
            saved = tape.pop()
            if len(saved) == 1 and again is not None:
                _, saved = self.block(number, saved[0], angles, again)
            d_x = self.block_backward(number, d_x, saved, angles, attend, gradients)
        table = "model.embed_tokens.weight"
        add(gradients, table, embedding_backward(d_x, tokens, self.weights[table]))
        return gradients

    def block_backward(
        self, number: int, d_z: Array, saved: Any, angles: tuple[Array, Array], attend: AttendBackward,
        gradients: dict[str, Array],
    ) -> Array:  # fmt: skip
        """Return the gradient of the block's input; add those of its weights."""
        x, out, attended, y, gate, up = saved

        def back(d_out: Array, given: Array, name: str) -> Array:
            d_given, d_weight, _ = linear_backward(d_out, given, self.of(number, name))
            add(gradients, full(number, name), d_weight)
            return d_given

        def norm_back(d_out: Array, given: Array, name: str) -> Array:
            d_given, d_weight = rms_norm_backward(d_out, given, self.of(number, name), self.eps)
            add(gradients, full(number, name), d_weight)
            return d_given

        d_gate, d_up = swiglu_backward(back(d_z, swiglu(gate, up), "mlp.down_proj"), gate, up)
        h = rms_norm(y, self.of(number, "post_attention_layernorm"), self.eps)
        d_h = back(d_gate, h, "mlp.gate_proj") + back(d_up, h, "mlp.up_proj")
        d_y = d_z + norm_back(d_h, y, "post_attention_layernorm")
        d_out = to_heads(back(d_y, to_rows(out), "self_attn.o_proj"), self.config.head_dim)
        d_q, d_k, d_v = attend(d_out, attended)
        d_q, d_k = rotary_backward(d_q, *angles), rotary_backward(d_k, *angles)
        h = rms_norm(x, self.of(number, "input_layernorm"), self.eps)
        d_h = back(to_rows(d_q), h, "self_attn.q_proj")
        d_h += back(to_rows(d_k), h, "self_attn.k_proj")
        d_h += back(to_rows(d_v), h, "self_attn.v_proj")
        return d_y + norm_back(d_h, x, "input_layernorm")

    def products(self, h: Array, number: int, *names: str) -> list[Array]:
        """Return the product of h, (b, t, f), with each of some matrices of a block; for a few tokens, one for all."""
        joined = self.joined.get(tuple(full(number, name) for name in names))
        if joined is None or h.shape[1] > FEW:
            return [linear(h, self.of(number, name)) for name in names]
        whole, end, parts = linear(h, joined), 0, []
        for name in names:
            start, end = end, end + len(self.of(number, name))
            parts.append(whole[..., start:end])
        return parts

    def of(self, number: int, name: str) -> Array:
        """Return a weight of a block."""
        return self.weights[full(number, name)]

    def angles(self, positions: Positions) -> tuple[Array, Array]:
        """Return cosine and sine of the rotary angles at these positions, as `rotary` takes them.

        Frequencies and angles are rounded to float32, as in the code that such models were trained with.
        """
        xp, dtype = namespace(self.weights["model.norm.weight"]), self.weights["model.norm.weight"].dtype
        angles = np.outer(positions.astype(np.float32), self.config.frequencies)  # (t, d / 2)
        cos, sin = (turn(angles, dtype=np.float64).astype(dtype) for turn in (np.cos, np.sin))
        return xp.asarray(np.stack([cos, cos], axis=1)), xp.asarray(np.stack([-sin, sin], axis=1))


def full(number: int, name: str) -> str:
    """Return the full name of a weight of a block."""
    return f"model.layers.{number}.{name}.weight"


def to_heads(rows: Array, head_dim: int) -> Array:
    """Return (b, t, heads * head_dim) as (b, heads, t, head_dim)."""
    b, t, f = rows.shape
    heads: Array = rows.reshape(b, t, f // head_dim, head_dim).swapaxes(1, 2)
    return heads


def to_rows(heads: Array) -> Array:
    """Return (b, heads, t, head_dim) as (b, t, heads * head_dim)."""
    b, h, t, d = heads.shape
    rows: Array = heads.swapaxes(1, 2).reshape(b, t, h * d)
    return rows


def add(gradients: dict[str, Array], name: str, share: Array) -> None:
    """Add a share to a gradient."""
    gradients[name] = gradients[name] + share if name in gradients else share


def initial(config: Config, seed: int, dtype: DTypeLike = np.float32) -> dict[str, Array]:
    """Return weights to begin training with: normal with deviation 0.02, those back to x less with the depth; norms 1.

    Parameters
    ----------
    config : Config
    seed : int
        The same weights on every rank, whatever their number.
    """
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in config.shapes.items():
        deviation = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * config.num_hidden_layers)
        weights[name] = (np.ones(shape) if len(shape) == 1 else deviation * rng.standard_normal(shape)).astype(dtype)
    return weights
