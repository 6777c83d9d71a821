"""The check of one case: values, gradients, and every byte that is received."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..algorithms import shares
from ..arrays import Array
from ..arrays.operations import on_host
from ..costs.traffic import Costs, sink_gradient
from ..messages.message import Communicator
from ..trace.comm import TracedComm
from . import oracle
from .case import Case, problem

Factory = Callable[..., Any]


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
    traffic: Callable[..., Costs] | None = None,
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
        by_tokens = shares.by_tokens(case.layout, comm.Get_size())
        places = {name: attention.owned(name, shapes) if hasattr(attention, "owned") else by_tokens for name in given}
        own = {
            name: xp.asarray(np.ascontiguousarray(whole[places[name](whole.shape, comm.Get_rank())]))
            for name, whole in given.items()
        }
        heads = shares.owned_heads(places["out"](shapes["out"], comm.Get_rank()))
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
            d_sinks = on_host(attention.sink_gradient(own["out"], saved))
            reference = right["d_sinks"]
            wrong += compare("d_sinks", d_sinks, reference[heads], reference, case.dtype, least["d_sinks"])
            seen, formula = traced.trace.received(), sink_gradient(attention.problem, comm.Get_rank())
            if traffic is not None and seen != (formula.messages, formula.nbytes):
                wrong.append(
                    f"sink_gradient received {seen[0]} messages of {seen[1]} bytes, the formula says {formula}"
                )
        for name, result in results.items():
            result = on_host(result)
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


def with_copies(comm: Communicator, gradient: Array, place: shares.Where, shape: tuple[int, ...]) -> Array:
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
    total = np.sum(comm.allgather(whole), axis=0)[here].astype(gradient.dtype)
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
