"""Where the command line's queries, keys and values come from: the sample, a file, or a seed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import planner
from ..algorithms import Attention
from ..algorithms.posed import fit
from ..algorithms.shares import owned_heads, scatter
from ..arrays import FLOAT_NAMES, Array
from ..arrays import dtype as dtype_of
from ..machines.reading import check_memory
from ..messages.message import Communicator
from ..planner import Choice
from ..planner.units import count
from ..problems.dropout import Dropout
from ..problems.problem import PARTIALS
from . import files, terminal

SYNTHETIC = {"tokens": 2048, "heads": 8, "kv_heads": None, "head_dim": 64, "batch": 1}


@dataclass
class Inputs:
    """Global arrays: q (batch, heads, tokens, head_dim), k and v (batch, kv_heads, tokens, head_dim), d_out."""

    name: str
    q: Array
    k: Array
    v: Array
    d_out: Array

    def describe(self) -> dict[str, object]:
        """Return what the input is, for people and for JSON."""
        return {
            "name": self.name,
            "dtype": self.q.dtype.name,
            **{name: list(getattr(self, name).shape) for name in ("q", "k", "v")},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose an input."""
    group = parser.add_argument_group("input (by default the real one that comes with mpiattn)")
    group.add_argument("--qkv", metavar="FILE", type=Path, help=".npz or .safetensors with q, k, v and maybe d_out")
    group.add_argument("--names", type=names, metavar="Q,K,V", help="of the arrays in the file, as in query,key,value")
    group.add_argument(
        "--axes",
        choices=files.AXES,
        help="order of batch, heads, tokens, head_dim in the file, and in what is written (default bhtd)",
    )
    group.add_argument(
        "--tokens",
        type=partial(count, least=0),
        metavar="N",
        help="random input of this length, such as 2K (default 2048)",
    )
    group.add_argument("--heads", type=int, metavar="N", help="random input with so many query heads (default 8)")
    group.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: as many as query heads)")
    group.add_argument("--head-dim", type=int, metavar="N", help="random input with this head_dim (default 64)")
    group.add_argument("--batch", type=int, metavar="N", help="random input with this batch size (default 1)")
    group.add_argument(
        "--dtype",
        choices=FLOAT_NAMES,
        help="convert to this dtype (default float32; a file keeps its own)",
    )
    group.add_argument("--seed", type=int, help="of all that is random (default 0)")
    features = parser.add_argument_group("features (by default none)")
    features.add_argument(
        "--partials",
        choices=PARTIALS,
        default=PARTIALS[0],
        help="narrow: partial sums travel rounded to the input's dtype (default %(default)s: as they are added up)",
    )
    features.add_argument("--softcap", type=float, metavar="X", help="scores become X tanh(scores / X)")
    features.add_argument("--sinks", action="store_true", help="one more logit for each head, random, to attend to")
    features.add_argument("--dropout", type=float, metavar="RATE", help="of the probabilities, the same on any ranks")


def names(text: str) -> list[str]:
    """Read the names of q, k, v, and maybe of d_out, from the command line."""
    result = text.split(",")
    if not 3 <= len(result) <= 4 or len(set(result)) < len(result) or "" in result:
        raise argparse.ArgumentTypeError(f"{text!r}: three names are wanted, of q, k and v, or a fourth, of d_out")
    return result if len(result) == 4 else [*result, "d_out"]


def seed(args: argparse.Namespace) -> int:
    """Return the seed of all that is random."""
    return args.seed or 0


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what every algorithm is built with, but for its layout."""
    return {name: getattr(args, name) for name in ("mask", "scale", "softcap", "partials")}


def asked(args: argparse.Namespace) -> dict[str, object]:
    """Return those of the options that change the result, but for the mask, as text or JSON has them."""
    chosen = {name: getattr(args, name) for name in ("scale", "softcap", "partials", "sinks", "dropout")}
    drawn = {"seed": seed(args)} if args.sinks or args.dropout else {}
    return {name: value for name, value in chosen.items() if value not in (None, False, PARTIALS[0])} | drawn


def features(args: argparse.Namespace, heads: int) -> dict[str, Any]:
    """Return the sinks of all heads and the dropout that the options ask for."""
    result: dict[str, Any] = {}
    if args.sinks:
        result["sinks"] = np.random.default_rng(seed(args)).standard_normal(heads, dtype=np.float32)
    if args.dropout is not None:
        result["dropout"] = Dropout(args.dropout, seed(args))
    return result


def share(
    given: Inputs | None, comm: Communicator, attention: Attention, args: argparse.Namespace, xp: ModuleType
) -> tuple[dict[str, tuple[int, ...]], list[Array], dict[str, Any]]:
    """Give each rank its share of the input, which rank 0 has, as an algorithm takes it.

    Returns
    -------
    shapes : dict
        Of the whole "q", "k", "v", "out".
    arrays : list
        This rank's q, k, v, d_out, in the namespace `xp`.
    features : dict
        What `forward` is given beside them.
    """
    wholes = {"q": given.q, "k": given.k, "v": given.v, "out": given.d_out} if given else {}
    shapes = comm.bcast({name: whole.shape for name, whole in wholes.items()})
    places = {name: attention.owned(name, shapes) for name in shapes}
    arrays = [xp.asarray(scatter(wholes.get(name), comm, place)) for name, place in places.items()]
    beside = features(args, shapes["q"][1])
    if "sinks" in beside:
        heads = owned_heads(places["q"](shapes["q"], comm.Get_rank()))
        beside["sinks"] = xp.asarray(beside["sinks"][heads])
    return shapes, arrays, beside


def choose(comm: Communicator, given: Inputs | None, args: argparse.Namespace, backward: bool) -> Choice:
    """Return what the planner chooses for the input, which rank 0 has, on the machine `args.machine`."""
    sizes: Any = None
    if given:
        batch, heads, tokens, head_dim = given.q.shape
        _, kv_heads, kv_tokens, v_head_dim = given.v.shape
        sizes = {
            "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch,
            "dtype": given.q.dtype.name, "kv_tokens": kv_tokens, "v_head_dim": v_head_dim,
        }  # fmt: skip
    sizes = comm.bcast(sizes)
    asked = {name: getattr(args, name) for name in ("mask", "layout", "partials", "machine")}
    return planner.choose(comm, **sizes, **asked, backward=backward)


def load(args: argparse.Namespace, backward: bool = True) -> Inputs:
    """Return the input that the options ask for; without backward the file's d_out is not read.

    Raises
    ------
    ValueError, OSError
        Where the file is missing or damaged, or the options or the arrays do not fit together.
    """
    features(args, heads=0)  # finds a wrong dropout rate
    sizes = {name: getattr(args, name) for name in SYNTHETIC}
    given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
    if args.qkv is not None and given:
        raise ValueError(f"--qkv and {', '.join(given)} exclude each other: a file has its own sizes")
    for option in ("names", "axes"):
        if getattr(args, option) is not None and args.qkv is None:
            raise ValueError(f"--{option} does nothing without --qkv")
    if seed(args) < 0:
        raise ValueError(f"--seed is 0 or more, got {args.seed}")
    if args.seed is not None and not (backward or given or args.sinks or args.dropout is not None):
        raise ValueError("--seed does nothing here: only random inputs, sinks, dropout and --backward draw numbers")
    rng = np.random.default_rng(seed(args))
    if args.qkv is not None:
        wanted = (args.names or files.NAMES)[: 4 if backward else 3]
        arrays, name = files.read(args.qkv, wanted, args.axes or files.AXES[0]), str(args.qkv)
        found = {part: array.dtype.name for part, array in arrays.items()}
        if len(set(found.values())) > 1 and not args.dtype:
            listed = ", ".join(f"{part} {dtype}" for part, dtype in found.items())
            raise ValueError(f"{name}: they must have one dtype, got {listed}; --dtype converts them")
        warn_of_axes(arrays, args)
        dtype = dtype_of(args.dtype) if args.dtype else arrays["q"].dtype
    else:
        dtype = dtype_of(args.dtype or "float32")
        if given:
            sizes = {name: SYNTHETIC[name] if value is None else value for name, value in sizes.items()}
            arrays, name = synthetic(rng, **sizes), f"random, seed {seed(args)}"
        else:
            arrays, name = files.sample(), "SmolLM2-135M-Instruct, layer 15, on the GPL-3 text"
    q, k, v = (converted(part, arrays[part], dtype) for part in "qkv")
    fit([(array.shape, array.dtype) for array in (q, k, v)], f"{name}: ")
    args.mask.check(q.shape[2], k.shape[2])
    shape = *q.shape[:3], v.shape[3]
    d_out = arrays.get("d_out", rng.standard_normal(shape, dtype=np.float32))
    if d_out.shape != shape:
        raise ValueError(f"{name}: d_out is {d_out.shape}, but out, as q and v have it, is {shape}")
    return Inputs(name, q, k, v, converted("d_out", d_out, dtype))


def converted(name: str, array: Array, dtype: DTypeLike) -> Array:
    """Return an array in a dtype, or raise ValueError where it has numbers that are beyond the dtype."""
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array.astype(dtype))
    if dtype != array.dtype and np.isinf(result.astype(np.float64)).sum() > np.isinf(array.astype(np.float64)).sum():
        raise ValueError(f"{name} has numbers that are too large for {np.dtype(dtype).name}")
    return result


def warn_of_axes(arrays: dict[str, Array], args: argparse.Namespace) -> None:
    """Print a warning where heads outnumber tokens and no order of the axes is given: it may be another one."""
    shape = arrays["q"].shape
    if args.axes is None and all(arrays[name].shape[1] > arrays[name].shape[2] > 0 for name in "qk"):
        terminal.to_stderr(
            f"warning: q in {args.qkv} is {shape}, read as {shape[1]} heads of {shape[2]} tokens. If it is {shape[1]} "
            f"tokens with {shape[2]} heads, as flash-attention has them, give --axes bthd; if not, --axes bhtd."
        )


def synthetic(
    rng: np.random.Generator, tokens: int, heads: int, kv_heads: int | None, head_dim: int, batch: int
) -> dict[str, Array]:
    """Return standard normal q, k, v."""
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, kv_heads, head_dim, batch) < 1 or tokens < 0:
        raise ValueError("--heads, --kv-heads, --head-dim and --batch are at least 1, --tokens at least 0")
    if heads % kv_heads:
        raise ValueError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
    numbers = batch * (heads + 2 * kv_heads) * tokens * head_dim
    check_memory(numbers * np.dtype(np.float32).itemsize, "random input of these sizes")
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: rng.standard_normal((batch, count, tokens, head_dim), dtype=np.float32) for name, count in shapes.items()
    }
