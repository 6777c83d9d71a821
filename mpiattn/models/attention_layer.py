"""Attention with its projections on spread tokens, and the same for a whole sequence on rank 0.

`AttentionLayer` and `SequenceParallel` are the modules of the article on Mesh-Attention (`MeshAttention` and
`SequenceParallelMeshAttention`, its section 4) for every algorithm, exact and with gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..algorithms import ALGORITHMS, Attention, Saved
from ..algorithms.options import agree, check_names
from ..algorithms.saved import fingerprint
from ..algorithms.shares import gather, scatter
from ..algorithms.sharing import check_sharing
from ..algorithms.spelling import examples
from ..arrays import FLOAT_NAMES, FLOATS, Array, namespace
from ..errors import InputError
from ..messages.connection import private
from ..messages.message import Communicator
from ..messages.reduction import all_reduce
from ..problems import grid
from ..problems.dropout import Dropout
from ..problems.scalars import shown, whole
from .layers import linear, linear_backward
from .llama import to_heads, to_rows

PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class SavedLayer:
    """Arrays that `AttentionLayer.backward` needs of `forward`."""

    x: Array
    rows: Array
    saved: Saved
    print: int = 0
    """Fingerprint of x."""


class AttentionLayer:
    """W_o attention(W_q x, W_k x, W_v x) of tokens that are spread over the ranks.

    Parameters
    ----------
    d_model : int
        Features of a token.
    num_heads : int
        A divisor of d_model.
    grid_shape : (rows, cols), optional
        For algorithms on a grid; the nearest to a square by default.
    dropout : float
        Rate at which probabilities are dropped, where `forward` is given a seed.
    comm : mpi4py.MPI.Comm, optional
        COMM_WORLD by default.
    algorithm : str
        A name in `mpiattn.ALGORITHMS`, of one that shares out tokens.
    seed : int
        Of the initial weights, the same on every rank.
    dtype : dtype
        Of the weights: float64, float32, float16 or bfloat16.
    **options
        Of the algorithm, such as mask and layout.

    Attributes
    ----------
    weights : dict
        "W_q", "W_k", "W_v", "W_o": (d_model, d_model), output features first; "b_q", ...: (d_model,). NumPy arrays;
        replace them by CuPy arrays, and x may be one.
    attention : Attention
        `attention.positions(tokens)` says which tokens are this rank's.

    Raises
    ------
    InputError
        On every rank, where arguments do not fit together.
    """

    def __init__(
        self, d_model: int, num_heads: int, grid_shape: tuple[int, int] | None = None, dropout: float = 0.0, *,
        comm: Communicator | None = None, algorithm: str = "mesh", seed: int = 0, dtype: DTypeLike = np.float32,
        **options: Any,
    ) -> None:  # fmt: skip
        if comm is None:
            from mpi4py import MPI

            comm = MPI.COMM_WORLD
        own = partial(check, d_model, num_heads, grid_shape, dropout, algorithm, seed, sorted(options))
        agree(private(comm), own, partial(check_dtype, dtype))
        if grid_shape is not None:
            options["rows"], options["cols"] = grid.pair(grid_shape)
        self.attention: Attention = ALGORITHMS[algorithm](comm, **options)
        self.comm, self.d_model, self.head_dim, self.dropout = comm, d_model, d_model // num_heads, dropout
        rng, bound = np.random.default_rng(seed), 1 / math.sqrt(d_model)
        self.weights: dict[str, Array] = {}
        for name in PROJECTIONS:
            self.weights[f"W_{name}"] = rng.uniform(-bound, bound, (d_model, d_model)).astype(dtype)
            self.weights[f"b_{name}"] = rng.uniform(-bound, bound, d_model).astype(dtype)

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, SavedLayer]:
        """Return the layer's output for this rank's tokens, (batch, tokens, d_model), and what `backward` needs.

        Parameters
        ----------
        x : (batch, tokens, d_model)
            This rank's tokens, as the layout has them.
        seed : int, optional
            Of the dropout, in training: another one at each step, the same on every rank.
        """
        self.attention.usable()
        drop, q, k, v = self.attention.agreement.together(partial(self.prepare, x, seed))
        out, saved = self.attention.forward(q, k, v, dropout=drop)
        rows = to_rows(out)
        return self.project(rows, "o"), SavedLayer(x, rows, saved, fingerprint(x))

    def backward(self, d_out: Array, saved: SavedLayer) -> tuple[Array, dict[str, Array]]:
        """Return the gradients of x, of this rank's tokens, and of the weights, summed over all ranks.

        Parameters
        ----------
        d_out : (batch, tokens, d_model)
        saved : SavedLayer
            From `forward`.
        """
        self.attention.usable()
        self.attention.agreement.together(partial(check_backward, d_out, saved))
        gradients: dict[str, Array] = {}
        d_rows = self.project_backward(d_out, saved.rows, "o", gradients)
        d_heads = self.attention.backward(to_heads(d_rows, self.head_dim), saved.saved)
        d_x = namespace(saved.x).zeros_like(saved.x)
        for name, d in zip("qkv", d_heads, strict=True):
            d_x += self.project_backward(to_rows(d), saved.x, name, gradients)
        for gradient in gradients.values():
            all_reduce(self.attention.comm, gradient)
        return d_x, gradients

    def prepare(self, x: Array, seed: int | None) -> tuple[Dropout | None, Array, Array, Array]:
        """Return the dropout, q, k and v of this rank's tokens, (b, heads, t, d); an InputError where x is none."""
        shape: tuple[int, ...] = getattr(x, "shape", ())
        if len(shape) != 3 or shape[2] != self.d_model:
            raise InputError(f"x is {shape or type(x).__name__}; it must be an array (batch, tokens, {self.d_model})")
        check_floats("x", x)
        drop = Dropout(self.dropout, seed) if seed is not None and self.dropout else None
        q, k, v = (to_heads(self.project(x, name), self.head_dim) for name in "qkv")
        return drop, q, k, v

    def project(self, rows: Array, name: str) -> Array:
        """Return a projection of rows."""
        return linear(rows, self.weights[f"W_{name}"], self.weights[f"b_{name}"])

    def project_backward(self, d_out: Array, rows: Array, name: str, gradients: dict[str, Array]) -> Array:
        """Return the gradient of the rows; put those of the weights into `gradients`."""
        d_rows, gradients[f"W_{name}"], gradients[f"b_{name}"] = linear_backward(d_out, rows, self.weights[f"W_{name}"])
        return d_rows

    def free(self) -> None:
        """Free the communicators; all ranks call it together."""
        self.attention.free()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an exception the other ranks may be elsewhere: freeing is collective and could hang.
        if exception[0] is None:
            self.free()


class SequenceParallel(AttentionLayer):
    """The same layer for a whole sequence: rank 0 gives it and receives the output.

    Parameters and errors: see `AttentionLayer`.
    """

    def forward(self, x: Array | None, seed: int | None = None) -> tuple[Array | None, SavedLayer]:  # type: ignore[override]
        """Return the output of all tokens on rank 0, None elsewhere; and what `backward` needs.

        Parameters
        ----------
        x : (batch, tokens, d_model) on rank 0, None elsewhere
        seed : int, optional
            See `AttentionLayer.forward`.
        """
        out, saved = super().forward(self.scatter(x), seed)
        return self.gather(out), saved

    def backward(self, d_out: Array | None, saved: SavedLayer) -> tuple[Array | None, dict[str, Array]]:  # type: ignore[override]
        """Return the gradient of x on rank 0, None elsewhere; and those of the weights on every rank."""
        d_x, gradients = super().backward(self.scatter(d_out), saved)
        return self.gather(d_x), gradients

    def scatter(self, x: Array | None) -> Array:
        """Return this rank's tokens of an array that rank 0 has."""
        return scatter(x, self.attention.comm, self.attention.layout, axis=1)

    def gather(self, rows: Array) -> Array | None:
        """Return all tokens on rank 0, None elsewhere."""
        return gather(rows, self.attention.comm, self.attention.layout, axis=1)


def check_backward(d_out: Array, saved: object) -> None:
    """Raise InputError where these are no gradient of a layer's output and what its `forward` saved."""
    if not isinstance(saved, SavedLayer):
        raise InputError(f"saved is not what a layer's forward returns, but {type(saved).__name__}")
    if (shape := getattr(d_out, "shape", None)) != saved.x.shape:
        raise InputError(f"d_out is {shape or type(d_out).__name__}; it must be an array {saved.x.shape}, as x was")
    check_floats("d_out", d_out)
    if saved.print != fingerprint(saved.x):
        raise InputError("x was changed between forward and backward, which reads it again: give forward a copy")


def check_floats(name: str, array: Array) -> None:
    """Raise InputError where an array is not of a dtype that the layer computes with."""
    if array.dtype not in FLOATS:
        raise InputError(f"{name} is an array of {array.dtype}; it must be one of {', '.join(FLOAT_NAMES)}")


def check_dtype(dtype: DTypeLike) -> None:
    """Raise ValueError where weights can't have that dtype: integers would all be 0."""
    try:
        known = np.dtype(dtype) in FLOATS
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype is one of {', '.join(FLOAT_NAMES)}, got {shown(dtype)}")


def check(
    d_model: int, num_heads: int, grid_shape: object, dropout: float, algorithm: str, seed: int, options: list[str]
) -> None:
    """Raise ValueError where there is no such layer."""
    check_sharing(algorithm)
    check_names(ALGORITHMS[algorithm], options)
    for name, number, least in (("d_model", d_model, 1), ("num_heads", num_heads, 1), ("seed", seed, 0)):
        if (given := whole(number)) is None or given < least:
            raise ValueError(f"{name} is a whole number, {least} or more, got {shown(number)}")
    if d_model % num_heads:
        raise ValueError(f"num_heads must be a divisor of d_model {d_model}, got {num_heads}")
    if grid_shape is not None and "rows" not in examples(algorithm):
        raise ValueError(f"{algorithm} has no grid: leave grid_shape out")
    Dropout(dropout, 0)  # finds a wrong rate
