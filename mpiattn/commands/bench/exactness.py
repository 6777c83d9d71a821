"""The errors of one problem, on any number of ranks, real or virtual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ... import arrays, machines
from ...algorithms import ALGORITHMS
from ...algorithms.shares import gather
from ...algorithms.spelling import Asked
from ...arrays import Array
from ...conformance import oracle
from ...messages.message import Communicator
from ...problems.mask import Causal
from ...virtual import run
from .. import files


def sample(tokens: int, dtype: str) -> dict[str, Array]:
    """Return q, k, v and the gradient of out: the first tokens of a group of heads of the sample."""
    whole = files.sample()
    group = whole["q"].shape[1] // whole["k"].shape[1]
    given = {"q": whole["q"][:, :group, :tokens], "k": whole["k"][:, :1, :tokens], "v": whole["v"][:, :1, :tokens]}
    given["out"] = np.random.default_rng(0).standard_normal((*given["q"].shape[:3], given["v"].shape[3]))
    return {name: array.astype(arrays.dtype(dtype)) for name, array in given.items()}


def reference(given: dict[str, Array]) -> list[Array]:
    """Return what the oracle makes of it."""
    q, k, v, d_out = given.values()
    return [oracle.attention(q, k, v, Causal())[0], *oracle.gradients(q, k, v, d_out, Causal())]


def attend(asked: Asked, comm: Communicator, given: dict[str, Array], partials: str) -> list[Array] | None:
    """Return out, d_q, d_k, d_v of the whole sequence on rank 0 of a communicator."""
    name, arguments = asked
    with ALGORITHMS[name](comm, mask=Causal(), partials=partials, **arguments) as attention:
        shapes = {name: whole.shape for name, whole in given.items()}
        places = {name: attention.owned(name, shapes) for name in given}
        q, k, v, d_out = (
            np.ascontiguousarray(whole[places[name](whole.shape, comm.Get_rank())]) for name, whole in given.items()
        )
        out, saved = attention.forward(q, k, v)
        results = out, *attention.backward(d_out, saved)
        whole = [
            gather(array, comm, places[name], shape=shapes[name], copies=name in attention.copied)
            for name, array in zip(("out", "q", "k", "v"), results, strict=True)
        ]
    return None if comm.Get_rank() else [array for array in whole if array is not None]


def attend_virtually(asked: Asked, ranks: int, given: dict[str, Array], partials: str) -> list[Array]:
    """Return the same from a cluster of virtual ranks."""
    results = run(ranks, machines.load("laptop"), lambda comm: attend(asked, comm, given, partials))[0]
    assert results is not None  # of rank 0
    return results


def errors(results: Sequence[Array], right: Sequence[Array]) -> dict[str, list[float]]:
    """Return both measures of each result."""
    pairs = list(zip(results, right, strict=True))
    rms = [float(np.sqrt(((result - exact) ** 2).mean() / (exact**2).mean())) for result, exact in pairs]
    return {"rms": rms, "largest": [oracle.error(result, exact) for result, exact in pairs]}
