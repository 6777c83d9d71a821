"""Decode: new tokens attend to a cache whose shards lie on the ranks, of any lengths and at any positions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import Causal, DecodeAttention, InputError, SlidingWindow
from mpiattn.arrays import Array
from mpiattn.conformance import oracle
from mpiattn.conformance.case import Case, problem
from mpiattn.conformance.differences import compare
from mpiattn.costs import COSTS
from mpiattn.problems.mask import parse
from mpiattn.trace.comm import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI


def cache(ranks: int, tokens: int, shape: str) -> list[Array]:
    """Return the positions of each rank's shard."""
    positions = np.arange(tokens)
    if shape == "uneven":
        return np.split(positions, sorted(np.random.default_rng(2).integers(0, tokens + 1, ranks - 1)))
    if shape == "one":
        return [positions if rank == ranks // 2 else positions[:0] for rank in range(ranks)]
    owner = np.random.default_rng(3).integers(0, ranks, tokens)  # any positions anywhere
    return [positions[owner == rank] for rank in range(ranks)]


@pytest.mark.mpi
@pytest.mark.parametrize("combine", ["allreduce", "tree", "alltoall"])
@pytest.mark.parametrize("shape", ["uneven", "one", "given"])
def test_decode(comm: MPI.Intracomm, shape: str, combine: str) -> None:
    """The last tokens attend to shards of any lengths: the same bits on every rank, traffic by the formula."""
    rank = comm.Get_rank()
    masks = ("full", "causal", "window=3", "window=6,1", "documents=9,8+causal")
    for number, (mask, new) in enumerate(itertools.product(masks, (1, 3))):
        dtype = ("float64", "float32", "bfloat16")[number % 3]
        case = Case(tokens=17, mask=mask, kv_heads=(4, 1)[number % 2], v_head_dim=3, dtype=dtype)
        q, k, v, d_out = (problem(case)[0][name] for name in ("q", "k", "v", "out"))
        mine, queries = cache(comm.Get_size(), case.tokens, shape)[rank], np.arange(case.tokens - new, case.tokens)
        traced = TracedComm(comm)
        with DecodeAttention(traced, mask=parse(mask), combine=combine) as attention:
            traced.trace.clear()
            given = mine if shape == "given" else None
            heads = attention.owned("out", {"q": q.shape})(d_out.shape, rank)[-1]  # all, but after an all-to-all
            out, saved = attention.forward(q[:, :, queries], k[:, :, mine], v[:, :, mine], given)
            forward = traced.trace.received()
            assert np.array_equal(attention.again(q[:, :, queries], k[:, :, mine], v[:, :, mine]), out)
            traced.trace.clear()
            d_q, d_k, d_v = attention.backward(d_out[:, heads][:, :, queries], saved)
            costs = COSTS["decode"](attention.problem, rank, combine)
            for seen, formula in ((forward, costs.forward), (traced.trace.received(), costs.backward)):
                assert seen == (formula.messages, formula.nbytes)
        right_out, right_lse = oracle.attention(q, k, v, parse(mask), None, queries)
        right_q, right_k, right_v = oracle.gradients(q, k, v, d_out[:, :, queries], parse(mask), None, queries)
        wrong = [
            *compare("out", out, right_out[:, heads], right_out, dtype),
            *compare("lse", saved.lse, right_lse[:, heads], right_lse, dtype, least=1),
            *compare("d_q", d_q, right_q, right_q, dtype, least=1e-3),
            *compare("d_k", d_k, right_k[:, :, mine], right_k, dtype, least=1e-3),
            *compare("d_v", d_v, right_v[:, :, mine], right_v, dtype, least=1e-3),
        ]
        assert wrong == []
        same = [d_q] if combine == "alltoall" else [out, saved.lse, d_q]
        bits = b"".join(np.ascontiguousarray(array).tobytes() for array in same)
        assert len(set(comm.allgather(bits))) == 1


def random(tokens: int, kv_tokens: int) -> list[Array]:
    """Return q, k, v."""
    given, _ = problem(Case(tokens=tokens, kv_tokens=kv_tokens, mask="full"))
    return [given[name] for name in "qkv"]


@pytest.mark.mpi(min_size=2)
def test_decode_leaves_out_ranks(comm: MPI.Intracomm) -> None:
    """With a window inside the last shard, one partial result goes up the tree, and the result comes down."""
    size = comm.Get_size()
    q, k, v = random(1, 8 * size)
    traced = TracedComm(comm)
    with DecodeAttention(traced, mask=SlidingWindow(5), combine="tree") as attention:
        mine = attention.positions(8 * size)
        traced.trace.clear()
        attention.forward(q, k[:, :, mine], v[:, :, mine])
    messages = comm.allgather(traced.trace.received()[0])
    assert sum(messages) == (size - 1) + bin(size - 1).count("1")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wrong", ["numbers", "tokens", "one rank", "order", "too many", "layout", "combine"])
def test_decode_bad_input(comm: MPI.Intracomm, wrong: str) -> None:
    rank = comm.Get_rank()
    last = rank == comm.Get_size() - 1
    q, k, v = random(2, 5)
    options: dict[str, Any] = {"mask": Causal()}
    positions: Array | None = None
    match wrong:
        case "numbers":
            q, message = q + rank, "other numbers"
        case "tokens":
            q, message = (q[:, :, :1] if last else q), "same queries"
        case "one rank":
            positions, message = (np.arange(5) if last else None), "not on all ranks"
        case "order":
            positions, message = np.arange(5)[:: -1 if last else 1], "ascending"
        case "too many":
            k, v, message = k[:, :, :0], v[:, :, :0], "sequence of 0"
        case "layout":
            options["layout"], message = "zigzag", "zigzag layout gives it"
            k, v = (k, v) if last else (k[:, :, :1], v[:, :, :1])
        case "combine":
            options["combine"], message = "star", "choose from allreduce, tree, alltoall"
    with pytest.raises(ValueError, match=message) as caught, DecodeAttention(comm, **options) as attention:
        attention.forward(q, k, v, positions)
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.mpi(sizes=[2, 3, 4])
def test_all_to_all_of_heads(comm: MPI.Intracomm) -> None:
    """With heads that the ranks divide, each receives (n-1)/n of (out, lse): half of what a sum over ranks takes."""
    size, heads, dim = comm.Get_size(), 12, 8
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, tokens, dim)) for tokens in (1, 24, 24))
    nbytes = {}
    for combine in ("alltoall", "allreduce"):
        traced = TracedComm(comm)
        with DecodeAttention(traced, combine=combine) as attention:
            mine = attention.positions(24)
            traced.trace.clear()
            out, _ = attention.forward(q, k[:, :, mine], v[:, :, mine])
            nbytes[combine] = traced.trace.received()
        if combine == "alltoall":
            share = slice(comm.Get_rank() * heads // size, (comm.Get_rank() + 1) * heads // size)
            right, _ = oracle.attention(q, k, v, parse("full"))
            assert np.allclose(out, right[:, share])
    assert nbytes["alltoall"] == (size - 1, (size - 1) * heads * (dim + 1) * 8 // size)
    assert 2 * nbytes["alltoall"][1] <= nbytes["allreduce"][1]


@pytest.mark.mpi(max_size=3)
def test_again_takes_what_forward_was_given_last(comm: MPI.Intracomm) -> None:
    q, k = np.ones((1, 2, 1, 4)), np.ones((1, 2, 3, 4))
    with DecodeAttention(comm) as attention:
        for before, given in (
            ([], [q, k, k]),
            ([q, k, k], [q, k[:, :, :2], k[:, :, :2]]),
            ([q, k, k], [q.astype(np.float32), k, k]),
        ):
            if before:
                attention.forward(*before)
            with pytest.raises(InputError, match="again takes"):
                attention.again(*given)
        attention.forward(q, k, k, sinks=np.ones(2))
        with pytest.raises(InputError, match="without sinks"):
            attention.again(q, k, k)
    with pytest.raises(InputError, match="this attention has ended"):
        attention.again(q, k, k)
