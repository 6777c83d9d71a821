"""Check an implementation of attention against the oracle: values, gradients, and every byte it receives.

By default all of mpiattn's algorithms. With --module PACKAGE:FACTORY yours: FACTORY is a class or a function
that is called with a communicator and the options layout, mask and scale, and returns a context manager with

  forward(q, k, v) -> out, saved        this rank's tokens; saved.lse is its log-sum-exp
  backward(d_out, saved) -> d_q, d_k, d_v

Some cases have the options softcap or partials, give `forward` sinks=ARRAY or dropout=mpiattn.Dropout(...), and ask for
sink_gradient(d_out, saved) -> d_sinks. An implementation without such a feature raises TypeError, ValueError or
NotImplementedError on all ranks before the first message; the case then counts as refused.

Exit status 1 if any case is wrong; each is printed with what to run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, get_args, get_type_hints

import numpy as np

from . import arrays, costs, gpu, layout, oracle
from .algorithms import ALGORITHMS
from .dropout import Dropout
from .layout import LAYOUTS
from .mask import parse
from .message import Communicator, InputError
from .oracle import Array
from .progress import bar
from .trace import TracedComm

Factory = Callable[..., Any]


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
            convert = next(kind for kind in (*get_args(types[name]), types[name]) if kind is not type(None))
            values[name] = value == "True" if convert is bool else convert(value)
        return cls(**values)

    @property
    def options(self) -> dict[str, Any]:
        """What the algorithm is built with."""
        options = {"layout": self.layout, "mask": parse(self.mask), "scale": self.scale}
        unusual = {
            name: getattr(self, name) for name in ("softcap", "partials") if getattr(self, name) != getattr(Case, name)
        }
        return {**options, **unusual}

    @property
    def given(self) -> dict[str, Any]:
        """What `forward` is given beside q, k, v and sinks."""
        return {"dropout": Dropout(self.dropout, self.seed)} if self.dropout else {}

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
        Case(layout="contiguous", mask="full", kv_tokens=50),
        Case(layout="striped", mask="full", kv_tokens=3, dtype="float32"),
        # Messages too large for the buffers of an MPI library: they wait for the receiver.
        Case(tokens=2048, heads=2, head_dim=64, v_head_dim=64, dtype="float32"),
    ]


def matrix() -> list[Case]:
    """Return the whole matrix: layouts x masks, and each shape on them that fits."""
    plain = [Case(layout=layout, mask=mask) for layout, mask in itertools.product(LAYOUTS, MASKS)]
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
    rng = np.random.default_rng(case.seed)
    given = {name: rng.standard_normal(shape) for name, shape in (case.shapes | {"sinks": (case.heads,)}).items()}
    if case.peak:
        for name in "qk":
            given[name][..., 0] = np.sqrt(case.peak / (case.scale or case.head_dim**-0.5))
    given = {name: array.astype(arrays.dtype(case.dtype)) for name, array in given.items()}
    q, k, v, d_out, sinks = given.values()
    mask = parse(case.mask)
    features: dict[str, Any] = {"softcap": case.softcap, "sinks": sinks if case.sinks else None, **case.given}
    out, lse = oracle.attention(q, k, v, mask, case.scale, **features)
    d_q, d_k, d_v = oracle.gradients(q, k, v, d_out, mask, case.scale, **features)
    right = {"out": out, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    if case.sinks:
        right["d_sinks"] = oracle.sink_gradient(q, k, v, d_out, mask, case.scale, **features)
    return given, right


class Refused(Exception):
    """An implementation lacks a feature of the case."""


@contextlib.contextmanager
def refusing(case: Case) -> Iterator[None]:
    """Raise Refused where an implementation says that it lacks a feature."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if not case.optional:
            raise
        raise Refused(f"{case}: {error}") from error


def check(
    factory: Factory,
    comm: Communicator,
    case: Case,
    traffic: Callable[..., costs.Costs] | None = None,
    xp: Any = np,
) -> None:
    """Raise AssertionError, on every rank alike, where a rank's results or traffic are wrong; or Refused.

    Parameters
    ----------
    factory : called with a communicator and `Case.options`
    comm : mpi4py.MPI.Comm
    case : Case
    traffic : called with the problem and the rank, optional
        Returns what the rank should receive.
    xp : module
        Whose arrays: NumPy's, or CuPy's on a GPU.
    """
    given, right = problem(case)
    sinks = given["sinks"]
    given = {name: whole for name, whole in given.items() if name != "sinks"}
    traced = TracedComm(comm)
    with contextlib.ExitStack() as stack:
        with refusing(case):
            attention = stack.enter_context(factory(traced, **case.options))
        shapes = {name: whole.shape for name, whole in given.items()}
        by_tokens = layout.by_tokens(case.layout, comm.Get_size())
        places = {name: attention.owned(name, shapes) if hasattr(attention, "owned") else by_tokens for name in given}
        own = {
            name: xp.asarray(np.ascontiguousarray(whole[places[name](whole.shape, comm.Get_rank())]))
            for name, whole in given.items()
        }
        heads = layout.owned_heads(places["out"](shapes["out"], comm.Get_rank()))
        features = {**case.given, **({"sinks": xp.asarray(sinks[heads])} if case.sinks else {})}
        with refusing(case):
            out, saved = attention.forward(own["q"], own["k"], own["v"], **features)
        forward = traced.trace.received()
        traced.trace.clear()
        d_q, d_k, d_v = attention.backward(own["out"], saved)
        backward = traced.trace.received()
        results = {"out": out, "lse": saved.lse, "d_q": d_q, "d_k": d_k, "d_v": d_v}
        wrong, least = [], cancelling(case, given)
        if case.sinks:
            traced.trace.clear()
            d_sinks = arrays.on_host(attention.sink_gradient(own["out"], saved))
            reference = right["d_sinks"]
            wrong += compare("d_sinks", d_sinks, reference[heads], reference, case.dtype, least["d_sinks"])
            seen, formula = traced.trace.received(), costs.sink_gradient(attention.problem, comm.Get_rank())
            if traffic is not None and seen != (formula.messages, formula.nbytes):
                wrong.append(
                    f"sink_gradient received {seen[0]} messages of {seen[1]} bytes, the formula says {formula}"
                )
        for name, result in results.items():
            result = arrays.on_host(result)
            place = places["out" if name == "lse" else name.removeprefix("d_")]
            reference = right[name][place(right[name].shape, comm.Get_rank())]
            if name in ("d_k", "d_v"):
                result = with_copies(comm, result, place, right[name].shape)
            wrong += compare(name, result, reference, right[name], case.dtype, least.get(name, 0))
        if traffic is not None:
            expected = traffic(attention.problem, comm.Get_rank())
            for name, seen, formula in (
                ("forward", forward, expected.forward),
                ("backward", backward, expected.backward),
            ):
                if seen != (formula.messages, formula.nbytes):
                    wrong.append(f"{name} received {seen[0]} messages of {seen[1]} bytes, the formula says {formula}")
    reports = [f"rank {rank}: {'; '.join(text)}" for rank, text in enumerate(comm.allgather(wrong)) if text]
    if reports:
        raise AssertionError(f"{case}\n" + "\n".join(reports))


def with_copies(comm: Communicator, gradient: Array, place: layout.Where, shape: tuple[int, ...]) -> Array:
    """Return a share of a gradient plus that of its copies on other ranks, as of K/V heads in tensor parallelism."""
    here, copies = place(shape, comm.Get_rank()), np.zeros(shape, int)
    for rank in range(comm.Get_size()):
        copies[place(shape, rank)] += 1
    if copies.max(initial=0) <= 1:
        return gradient
    whole = np.zeros(shape)
    fits = gradient.shape == whole[here].shape
    if fits:
        whole[here] = gradient
    total = comm.allreduce(whole)[here].astype(gradient.dtype)
    return total if fits else gradient


def cancelling(case: Case, given: dict[str, Array]) -> dict[str, float]:
    """Return an eighth of the largest that the terms can be whose differences make a gradient.

    An error is relative to no less: where the terms cancel, as they do for a query that sees one key, their
    rounding is left, half an eps of `out` that `delta` is made of, which an eighth keeps below the tolerances.
    """
    q, k, v, d_out = (
        np.linalg.norm(given[name].astype(np.float64), axis=-1).max(initial=0) for name in (*"qkv", "out")
    )
    factor = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    d_p = d_out * v / (1 - case.dropout) / 8
    # What an error of lse does to probabilities depends on its size, not on that of lse.
    return {"lse": 1.0, "d_q": d_p * factor * k, "d_k": d_p * factor * q, "d_sinks": d_p}


def compare(name: str, result: Array, reference: Array, whole: Array, dtype: str, least: float = 0) -> list[str]:
    """Return what is wrong with one rank's share of a result; errors are relative to its largest value, or `least`."""
    if result.shape != reference.shape:
        return [f"{name} is {result.shape} instead of {reference.shape}"]
    if name == "lse":  # -inf where a query attends to nothing
        if not np.array_equal(np.isneginf(result), np.isneginf(reference)):
            return ["lse is -inf elsewhere than it should be"]
        result, reference = (np.where(np.isneginf(array), 0, array) for array in (result, reference))
        whole = np.where(np.isneginf(whole), 0, whole)
    elif name != "d_sinks" and result.dtype.name != dtype:
        return [f"{name} is {result.dtype} instead of {dtype}"]
    largest = max(np.abs(whole).max(initial=0), least) or 1
    error = np.abs(result - reference).max(initial=0) / largest
    tolerance = oracle.TOLERANCES[dtype]
    return [] if error <= tolerance else [f"error of {name} {error:.1e} exceeds {tolerance:.0e}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn conformance`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--algorithms",
        default="all",
        metavar="NAME,...",
        help=f"of {', '.join(ALGORITHMS)}; a variant of one: 'mesh rows=2 cols=2'",
    )
    which.add_argument("--module", metavar="PACKAGE:FACTORY", help="an implementation of your own")
    parser.add_argument("--full", action="store_true", help="the whole matrix, not the part that has one of everything")
    parser.add_argument("--case", type=Case.parse, metavar="'NAME=VALUE ...'", help="this case alone")
    gpu.add_arguments(parser)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check every case of every implementation; print what is wrong on rank 0."""
    xp = gpu.namespace(args, comm)
    implementations = find(args, comm)
    chosen = [args.case] if args.case else matrix() if args.full else fast()
    wrong, refused = [], []
    progress = bar(comm, total=len(implementations) * len(chosen), unit="case")
    for (name, factory, traffic), case in itertools.product(implementations, chosen):
        progress.set_postfix_str(name)
        try:
            check(factory, comm, case, traffic, xp)
        except AssertionError as error:
            wrong.append(f"{error}\n  alone: {reproducer(comm, name, case, args)}")
        except Refused as error:
            refused.append(f"{name} refused {error}")
        except InputError as error:
            if args.kernel is None:
                raise
            refused.append(f"{name} refused {case}: {error}")
        progress.update()
    progress.close()
    if comm.Get_rank() == 0:
        print(*refused, *wrong, sep="\n", end="\n" if refused or wrong else "", file=sys.stderr)
        passed = len(implementations) * len(chosen) - len(wrong) - len(refused)
        count = f", {len(refused)} refused" if refused else ""
        print(f"{passed} passed, {len(wrong)} failed{count} on {comm.Get_size()} ranks")
    return 1 if wrong else 0


def reproducer(comm: Communicator, name: str, case: Case, args: argparse.Namespace | None = None) -> str:
    """Return the command that runs a case of an implementation alone."""
    which = ["--module" if ":" in name else "--algorithms", name, "--case", str(case)]
    for option, given in (("--arrays", args.arrays), ("--kernel", args.kernel)) if args else ():
        which += [option, given] if given else []
    return f"mpiexec -n {comm.Get_size()} mpiattn conformance {shlex.join(which)}"


def find(args: argparse.Namespace, comm: Communicator) -> list[tuple[str, Factory, Callable[..., costs.Costs] | None]]:
    """Return name, factory and formula of each implementation that is asked for."""
    given = {key: value for key, value in gpu.options(args).items() if value not in (None, "auto")}
    if args.module:
        package, _, name = args.module.partition(":")
        try:
            factory = getattr(importlib.import_module(package), name)
            return [(args.module, partial(factory, **given) if given else factory, None)]
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--module {args.module}: {error}") from None
    known = {
        (name, *(f"{key}={value}" for key, value in arguments.items())): (
            partial(ALGORITHMS[name], **arguments, **given),
            partial(costs.COSTS[name], **arguments),
        )
        for name in ALGORITHMS
        for arguments in ALGORITHMS[name].variants(comm.Get_size())
    }
    found: list[tuple[str, Factory, Callable[..., costs.Costs] | None]] = []
    for text in list(ALGORITHMS) if args.algorithms == "all" else args.algorithms.split(","):
        name, *wanted = text.split() or [text]
        if name not in ALGORITHMS:
            raise InputError(f"unknown algorithm {name}: choose from {', '.join(ALGORITHMS)}, or all")
        fits = [words for words in known if words[0] == name and set(wanted) <= set(words)]
        if not fits:
            others = ", ".join(" ".join(words) for words in known if words[0] == name)
            raise InputError(f"unknown variant {text!r} on {comm.Get_size()} ranks: choose from {others}")
        found += [(" ".join(words), *known[words]) for words in fits]
    return found
