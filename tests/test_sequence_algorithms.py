"""All-gather, Ulysses, hybrid and tensor parallelism: who has which heads and tokens, what is sent, what is refused."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

import mpiattn
from mpiattn import ALGORITHMS
from mpiattn.algorithms import hybrid
from mpiattn.arrays import Array
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
from mpiattn.conformance.oracle import error
from mpiattn.costs import COSTS
from mpiattn.costs.traffic import allreduce
from mpiattn.errors import InputError
from mpiattn.problems import layout
from mpiattn.trace.comm import TracedComm

NAMES = ("allgather", "ulysses", "hybrid", "tensor_parallel")
HEADS = [(4, 4), (8, 2), (6, 1), (3, 3), (5, 1), (6, 3), (12, 4), (1, 1)]


def conform(comm: Any, case: Case, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        for arguments in ALGORITHMS[name].variants(comm.Get_size()):
            check(partial(ALGORITHMS[name], **arguments), comm, case, partial(COSTS[name], **arguments))


# Who has what


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("ranks", range(1, 10))
def test_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Each query head is on one rank; a rank has the K/V heads that its query heads use, and no others."""
    group = heads // kv_heads
    shares = [layout.heads(heads, kv_heads, ranks, rank) for rank in range(ranks)]
    assert [head for own, _ in shares for head in range(heads)[own]] == list(range(heads))
    for own, own_kv in shares:
        assert sorted({head // group for head in range(heads)[own]}) == list(range(kv_heads)[own_kv])
        if own_kv.stop > own_kv.start:  # so that local query head h uses local K/V head h // (heads / kv_heads)
            size, rest = divmod(own.stop - own.start, own_kv.stop - own_kv.start)
            assert rest == 0 and (own_kv.stop - own_kv.start == 1 or size == group)
    counts = [own.stop - own.start for own, _ in shares]
    if kv_heads % ranks == 0 or (ranks % kv_heads == 0 and group % (ranks // kv_heads) == 0):
        assert len(set(counts)) == 1
    if group == 1:
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 101])
@pytest.mark.parametrize(("chunks", "parts"), [(1, 3), (2, 2), (3, 2), (2, 1)])
def test_shared_chunks(name: str, tokens: int, chunks: int, parts: int) -> None:
    """The ranks that share a chunk have its tokens in order, as many each as can be."""
    for chunk in range(chunks):
        runs = [layout.positions(f"{name}/{parts}", tokens, chunks * parts, chunk * parts + p) for p in range(parts)]
        assert np.array_equal(np.concatenate(runs), layout.positions(name, tokens, chunks, chunk))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize("wrong", ["zigzag/3", "zigzag/0", "zigzag/x", "zigzag/-2", "/2", "everywhere", "zigzag/2/2"])
def test_unknown_layouts(wrong: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        layout.check(wrong, 4)


# Values, gradients, bytes and messages


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_any_number_of_heads(comm: Any, heads: int, kv_heads: int) -> None:
    for tokens, mask in ((29, "causal"), (3, "window=4,2")):
        conform(comm, Case(heads=heads, kv_heads=kv_heads, tokens=tokens, mask=mask, v_head_dim=5, batch=2))


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes(comm: Any, dtype: str) -> None:
    """The ranks that share a K/V head send their partial sums wide."""
    for heads, kv_heads in ((4, 4), (4, 1), (6, 2)):
        conform(comm, Case(heads=heads, kv_heads=kv_heads, dtype=dtype, head_dim=16, v_head_dim=16))


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize(("tokens", "kv_tokens"), [(17, 40), (40, 3), (1, 9), (5, 0), (0, 5)])
def test_cross_attention(comm: Any, tokens: int, kv_tokens: int) -> None:
    conform(comm, Case(mask="full", tokens=tokens, kv_tokens=kv_tokens))


@pytest.mark.mpi(sizes=[1, 2, 4])
def test_messages_that_are_not_buffered(comm: Any) -> None:
    conform(comm, Case(tokens=256, heads=4, kv_heads=2, head_dim=256, v_head_dim=256, dtype="float32"))


@pytest.mark.mpi(max_size=6)
def test_problems_in_turn(comm: Any) -> None:
    """Forwards and backwards of several problems may be mixed."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        with ALGORITHMS[name](comm, mask=mpiattn.Causal()) as attention:
            runs = []
            for heads, kv_heads, tokens in ((4, 2, 20), (6, 1, 33)):
                shapes = {"q": (1, heads, tokens, 4), "k": (1, kv_heads, tokens, 4)}
                wholes = {"q": rng.standard_normal(shapes["q"]), "k": rng.standard_normal(shapes["k"])}
                q, k = (wholes[n][attention.owned(n, shapes)(shapes[n], comm.Get_rank())] for n in "qk")
                out, saved = attention.forward(q, k, k)
                runs.append((out, saved, attention.backward(out, saved)))
            for out, saved, gradients in runs:
                again = attention.backward(out, saved)
                assert all(map(np.array_equal, gradients, again)), name


# The formulas of the papers, in units of a rank's Q


def received(comm: Any, name: str, heads: int, kv_heads: int, mask: Any = None, **arguments: Any) -> tuple[Any, Any]:
    """Return (messages, bytes) received forward and backward, for 12 n float32 tokens a rank of head_dim 8."""
    traced = TracedComm(comm)
    tokens = 12 * comm.Get_size() * comm.Get_size()
    with ALGORITHMS[name](traced, mask=mask, layout="contiguous", **arguments) as attention:
        own = len(attention.positions(tokens))
        q, k = (np.ones((1, count, own, 8), np.float32) for count in (heads, kv_heads))
        out, saved = attention.forward(q, k, k)
        forward = traced.trace.received()
        traced.trace.clear()
        attention.backward(out, saved)
        return forward, traced.trace.received()


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("group", [1, 3])
def test_formulas(comm: Any, group: int) -> None:
    n = comm.Get_size()
    kv_heads = 2 * n
    heads = group * kv_heads
    row = heads * 12 * n * 4  # bytes of a row of delta, half of one of lse; a head of Q has 8 numbers for each
    q = 8 * row
    assert received(comm, "allgather", heads, kv_heads) == (
        (n - 1, (n - 1) * 2 * q // group),
        (2 * (n - 1), (n - 1) * 4 * q // group),
    )
    passes = received(comm, "ulysses", heads, kv_heads)
    for (messages, nbytes), rows in zip(passes, (2, 3), strict=True):
        assert messages == 2 * (n - 1)
        assert nbytes * n == (n - 1) * (2 * q + 2 * q // group + rows * row)
    for ulysses, rows_, cols in hybrid.shapes(n):
        passes = received(comm, "hybrid", heads, kv_heads, ulysses=ulysses, rows=rows_, cols=cols)
        exchange = [(ulysses - 1) * (2 * q + 2 * q // group + rows * row) // ulysses for rows in (2, 3)]
        if cols == 1:
            inner = [(rows_ - 1) * 2 * q // group, (rows_ - 1) * 4 * q // group]
        else:
            inner = [
                (cols - 1) * (2 * q + 2 * row) + (rows_ - 1) * 2 * q // group,
                (cols - 1) * (3 * q + 3 * row) + (rows_ - 1) * 4 * q // group,
            ]
        assert [nbytes for _, nbytes in passes] == [a + b for a, b in zip(exchange, inner, strict=True)]


@pytest.mark.mpi(sizes=[2, 4, 6])
def test_fewer_kv_heads_than_ranks(comm: Any) -> None:
    """Each rank is sent the one K/V head that it needs, not all."""
    n = comm.Get_size()
    (_, nbytes), _ = received(comm, "ulysses", 2 * n, 1)
    head = 12 * n * 8 * 4
    assert nbytes == (n - 1) * (2 * head + 2 * head + 2 * (head + 12 * n * 8))


@pytest.mark.mpi(sizes=[6])
def test_window_saves_messages_of_the_ring(comm: Any) -> None:
    """A short window brings the chunk before, whatever the number of chunks."""
    arguments = {"ulysses": 2, "rows": 3, "cols": 1}
    (_, all_bytes), _ = received(comm, "hybrid", 4, 4, **arguments)
    (_, window_bytes), _ = received(comm, "hybrid", 4, 4, mpiattn.SlidingWindow(5), **arguments)
    chunk = 2 * 2 * (12 * 6 * 2) * 8 * 4  # K and V, 2 heads, both ranks' tokens
    assert all_bytes - window_bytes == (2 if comm.Get_rank() < 2 else 1) * chunk


@pytest.mark.mpi(max_size=6)
def test_saved_does_not_grow_with_ranks(comm: Any) -> None:
    n = comm.Get_size()
    for name in NAMES:
        with ALGORITHMS[name](comm) as attention:
            shapes = {"q": (1, n, 6 * n, 8), "k": (1, n, 6 * n, 8)}
            index = attention.owned("q", shapes)(shapes["q"], comm.Get_rank())
            own = np.zeros(shapes["q"])[index]
            _, saved = attention.forward(own, own, own)
            arrays = (saved.q, saved.k, saved.v, saved.out)
            assert [array.nbytes for array in arrays] == 4 * [n * 6 * 8 * 8], name


# Tensor parallelism: the output projection


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("heads", [6, 2])
def test_projection(comm: Any, heads: int, dtype: str) -> None:
    """The rows of the weight lie on the ranks as the heads do; what every rank gets is the whole product."""
    rng = np.random.default_rng(0)
    tokens, dim, features, size, rank = 7, 5, 11, comm.Get_size(), comm.Get_rank()
    case = Case(dtype=dtype)
    out, weight, d_y = (
        rng.standard_normal(shape).astype(mpiattn.arrays.dtype(case.dtype))
        for shape in ((2, heads, tokens, dim), (heads, dim, features), (2, tokens, features))
    )
    traced = TracedComm(comm)
    with mpiattn.TensorParallelAttention(traced) as attention:
        own = layout.heads(heads, heads, size, rank)[0]
        rows = weight[own].reshape(-1, features)
        y = attention.project(out[:, own], rows)
        spec = (2, tokens, features), np.dtype("float64" if dtype == "float64" else "float32")
        expected = allreduce(spec, size, rank)
        assert traced.trace.received() == (expected.messages, expected.nbytes)
        traced.trace.clear()
        d_out, d_rows = attention.project_backward(d_y, out[:, own], rows)
        assert traced.trace.received() == (0, 0)
    wide_out, wide_weight, wide_d_y = (array.astype(np.float64) for array in (out, weight, d_y))
    tolerance = mpiattn.conformance.oracle.TOLERANCES[dtype]
    assert y.dtype == out.dtype
    assert error(y, np.einsum("bhtd,hdf->btf", wide_out, wide_weight)) < tolerance
    assert error(d_out, np.einsum("btf,hdf->bhtd", wide_d_y, wide_weight)[:, own]) < tolerance
    expected_rows = np.einsum("bhtd,btf->hdf", wide_out, wide_d_y)[own].reshape(-1, features)
    assert error(d_rows, expected_rows) < tolerance


@pytest.mark.mpi(min_size=2, max_size=6)
def test_all_reduce(comm: Any) -> None:
    with mpiattn.TensorParallelAttention(comm) as attention:
        total = attention.all_reduce(np.full((3, 2), comm.Get_rank(), np.float32).T)
        assert np.array_equal(total, np.full((2, 3), sum(range(comm.Get_size()))))


# Bad input: the same error on every rank


def same_error(comm: Any, call: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("groups", [0, -1, 1.5, None])
def test_bad_head_groups(comm: Any, groups: Any) -> None:
    same_error(comm, lambda: mpiattn.AllGatherAttention(comm, head_groups=groups), "head_groups is 1 or more")


@pytest.mark.mpi(max_size=6)
def test_bad_grid(comm: Any) -> None:
    n = comm.Get_size()
    for ulysses, rows, cols in ((n + 1, None, None), (0, None, None), (1, n, 2), (None, n + 1, None), (-n, -1, 1)):
        build = partial(mpiattn.HybridAttention, comm, ulysses=ulysses, rows=rows, cols=cols)
        same_error(comm, build, f"is not {n} ranks: choose from .*1x{n}x1")


@pytest.mark.mpi(min_size=2, max_size=6)
def test_different_arguments(comm: Any) -> None:
    rank, n = comm.Get_rank(), comm.Get_size()
    same_error(comm, lambda: mpiattn.AllGatherAttention(comm, head_groups=1 + (rank > 0)), "rank 1 was given")
    same_error(comm, lambda: mpiattn.HybridAttention(comm, ulysses=1 if rank else n), "rank 1 was given")


@pytest.mark.parametrize("ranks", range(1, 13))
def test_completed_grids(ranks: int) -> None:
    assert hybrid.shape(ranks, None, None, None) in hybrid.shapes(ranks)
    for ulysses, rows, cols in hybrid.shapes(ranks):
        for given in product((True, False), repeat=3):
            asked = [size if use else None for size, use in zip((ulysses, rows, cols), given, strict=True)]
            result = hybrid.shape(ranks, *asked)
            assert result in hybrid.shapes(ranks)
            assert all(a in (None, b) for a, b in zip(asked, result, strict=True))


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arrays(comm: Any, name: str) -> None:
    """After each error the algorithm still works."""
    with ALGORITHMS[name](comm, layout="contiguous") as attention:
        shapes = {"q": (1, 6, 24, 4), "k": (1, 6, 24, 4)}
        index = attention.owned("q", shapes)(shapes["q"], comm.Get_rank())
        own: Array = np.random.default_rng(0).standard_normal(shapes["q"])[index]
        last = comm.Get_rank() == comm.Get_size() - 1
        dims = own[..., :3] if last else own
        same_error(comm, lambda: attention.forward(own, dims, own), "head_dim|only the number of")
        wide = own.astype(np.float32) if last else own
        same_error(comm, lambda: attention.forward(own, own, wide), "one dtype|only the number of")
        same_error(comm, lambda: attention.forward(own, own, None if last else own), "must be an array of 4 axes")
        out, saved = attention.forward(own, own, own)
        same_error(comm, lambda: attention.backward(out[:, :, :-1] if last else out, saved), "d_out on rank")
        _, other = attention.forward(own[:, :, :, :2], own[:, :, :, :2], own)
        if comm.Get_size() > 1:
            chosen = other if last else saved
            same_error(comm, lambda: attention.backward(out, chosen), "another forward than on rank 0")
        attention.backward(out, saved)


@pytest.mark.mpi(min_size=2, max_size=6)
def test_bad_tokens(comm: Any) -> None:
    """Where tokens are spread their numbers must fit the layout; where heads are, all ranks have all tokens."""
    last = comm.Get_rank() == comm.Get_size() - 1
    for name, text in (("allgather", "layout of"), ("ulysses", "layout of"), ("tensor_parallel", "number of heads")):
        with ALGORITHMS[name](comm, layout="contiguous") as attention:
            own = np.zeros((1, 2, 9 if last else 4, 4))
            same_error(comm, lambda a=attention, x=own: a.forward(x, x, x), text)


@pytest.mark.mpi(max_size=6)
def test_bad_projection(comm: Any) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    out = np.zeros((1, 2, 3, 4))
    with mpiattn.TensorParallelAttention(comm) as attention:
        same_error(comm, lambda: attention.project(out, np.zeros((9 if last else 8, 5))), "heads \\* head_dim")
        same_error(comm, lambda: attention.project(out if not last else out[0], np.zeros((8, 5))), "heads \\* head_dim")
        if comm.Get_size() > 1:
            weight = np.zeros((8, 6 if last else 5))
            same_error(comm, lambda: attention.project(out, weight), "all-reduce takes")
