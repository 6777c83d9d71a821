"""Double ring, gathered mesh and decode: exact, and every byte as the formula says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpiattn import ALGORITHMS, Causal, DecodeAttention, Documents, DoubleRingAttention, Full, SlidingWindow
from mpiattn.arrays import dtype as dtype_of
from mpiattn.conformance import oracle
from mpiattn.costs import COSTS
from mpiattn.costs.traffic import Traffic
from mpiattn.messages import message
from mpiattn.problems.grid import grids
from mpiattn.problems.mask import Mask
from mpiattn.trace.comm import TracedComm

if TYPE_CHECKING:
    from mpi4py import MPI

Array = NDArray[Any]

TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
FULL = Full()
LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass
class Case:
    """A problem as a test states it."""

    q_tokens: int = 21
    kv_tokens: int = 21
    mask: Mask = FULL
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    v_head_dim: int = 4
    dtype: str = "float64"
    scale: float | None = None

    def arrays(self) -> list[Array]:
        """Return q, k, v, d_out of the whole sequences."""
        rng = np.random.default_rng(5)
        shapes = [
            (self.batch, heads, tokens, dim)
            for heads, tokens, dim in (
                (self.heads, self.q_tokens, self.head_dim),
                (self.kv_heads, self.kv_tokens, self.head_dim),
                (self.kv_heads, self.kv_tokens, self.v_head_dim),
                (self.heads, self.q_tokens, self.v_head_dim),
            )
        ]
        return [rng.standard_normal(shape).astype(dtype_of(self.dtype)) for shape in shapes]


CASES = [
    Case(),
    Case(mask=Causal()),
    Case(mask=SlidingWindow(3)),
    Case(mask=SlidingWindow(4, 2)),
    Case(mask=Documents([4, 0, 9, 8]) & Causal()),
    Case(mask=Documents([11, 10])),
    Case(q_tokens=7, kv_tokens=19),
    Case(q_tokens=19, kv_tokens=6, mask=Causal()),
    Case(q_tokens=2, kv_tokens=3, mask=Causal()),
    Case(q_tokens=0, kv_tokens=3),
    Case(heads=6, kv_heads=2, v_head_dim=3, mask=Causal(), scale=0.3),
    Case(heads=4, kv_heads=1, head_dim=3, v_head_dim=5, dtype="float32", mask=SlidingWindow(8)),
    Case(dtype="float16", mask=Causal(), head_dim=3),
    Case(dtype="bfloat16", v_head_dim=5),
]


def check(name: str, result: Array, expected: Array, dtype: str) -> None:
    """Compare with the oracle, relative to its largest value."""
    if not expected.size:
        assert result.shape == expected.shape, name
        return
    finite = np.isfinite(expected)
    assert np.array_equal(np.isneginf(result), np.isneginf(expected)), name
    error = np.abs(result.astype(np.float64) - expected, where=finite, out=np.zeros(expected.shape)).max()
    assert error <= TOLERANCE[dtype] * max(np.abs(expected[finite]).max(initial=0), 1e-3), f"{name} is off by {error}"


def received(comm: TracedComm) -> Traffic:
    """Return what this rank has received, and forget it."""
    traffic = Traffic(*comm.trace.received())
    comm.trace.clear()
    return traffic


def run(comm: Any, name: str, case: Case, layout: str, **arguments: Any) -> None:
    """Run an algorithm twice, forward and backward; check results and traffic."""
    q, k, v, d_out = case.arrays()
    out, lse = oracle.attention(q, k, v, case.mask, case.scale)
    grads = oracle.gradients(q, k, v, d_out, case.mask, case.scale)
    traced = TracedComm(comm)
    with ALGORITHMS[name](traced, layout=layout, mask=case.mask, scale=case.scale, **arguments) as attention:
        mine, keys = attention.positions(case.q_tokens), attention.positions(case.kv_tokens)
        shares = [
            np.ascontiguousarray(a[:, :, w]) for a, w in zip((q, k, v, d_out), (mine, keys, keys, mine), strict=True)
        ]
        first: list[Array] | None = None
        for _ in range(2):
            traced.trace.clear()
            result, saved = attention.forward(*shares[:3])
            forward = received(traced)
            gradients = attention.backward(shares[3], saved)
            backward = received(traced)
            check("out", result, out[:, :, mine], case.dtype)
            check("lse", saved.lse, lse[:, :, mine], case.dtype)
            for what, value, expected, where in zip(
                ("d_q", "d_k", "d_v"), gradients, grads, (mine, keys, keys), strict=True
            ):
                check(what, value, expected[:, :, where], case.dtype)
            assert attention.problem is not None
            costs = COSTS[name](attention.problem, comm.Get_rank(), **arguments)
            assert (forward, backward) == (costs.forward, costs.backward)
            bits = [np.array(a) for a in (result, saved.lse, *gradients)]
            assert first is None or all(a.tobytes() == b.tobytes() for a, b in zip(first, bits, strict=True))
            first = bits


@pytest.mark.mpi
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("name", ["double_ring", "mesh_gathered"])
def test_exact(comm: MPI.Intracomm, name: str, number: int) -> None:
    for turn, (rows, cols) in enumerate(grids(comm.Get_size())):
        arguments = {"outer": rows} if name == "double_ring" else {"rows": rows, "cols": cols}
        run(comm, name, CASES[number], LAYOUTS[(number + turn) % 3], **arguments)


class Late(TracedComm):
    """A communicator whose sends leave when they are waited for: a buffer that is written to before tells."""

    def _derived(self, comm: Any) -> TracedComm:
        derived = super()._derived(comm)
        return Late(derived.comm, derived.trace, derived.ranks)

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Any:
        return LateRequest(partial(super().Isend, buf, dest, tag))

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> Any:
        request = super().Irecv(buf, source, tag)
        return LateRequest(lambda: request)


class LateRequest:
    """A request that begins when it is waited for."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self.begin = begin

    @staticmethod
    def Waitall(requests: Sequence[LateRequest]) -> None:
        message.Waitall([request.begin() for request in requests])

    @staticmethod
    def Testall(requests: Sequence[LateRequest]) -> bool:
        return False


@pytest.mark.mpi
@pytest.mark.parametrize("mask", [FULL, Causal(), SlidingWindow(8)], ids=str)
@pytest.mark.parametrize("name", ["double_ring", "ring", "mesh"])
def test_buffers_stay_until_sent(comm: MPI.Intracomm, name: str, mask: Mask) -> None:
    for rows, cols in grids(comm.Get_size()):
        choices: dict[str, dict[str, Any]] = {"double_ring": {"outer": rows}, "mesh": {"rows": rows, "cols": cols}}
        run(Late(comm), name, Case(mask=mask), "contiguous", **choices.get(name, {}))


class Hosts(TracedComm):
    """A communicator whose ranks pretend to be on the hosts of this list."""

    def __init__(self, comm: Any, hosts: list[int]) -> None:
        super().__init__(comm)
        self.hosts = hosts

    def Split_type(self, split_type: Any, key: int = 0) -> TracedComm:
        return self.Split(self.hosts[self.Get_rank()], key)


@pytest.mark.mpi(sizes=[4, 6])
def test_rows_are_hosts(comm: MPI.Intracomm) -> None:
    """Ranks dealt to two hosts in turn: each row is a host, and only n/inner - 1 messages each way cross."""
    size, rank = comm.Get_size(), comm.Get_rank()
    traced = Hosts(comm, [r % 2 for r in range(size)])
    case = Case()
    q, k, v, d_out = case.arrays()
    with DoubleRingAttention(traced) as attention:
        assert (attention.outer, attention.inner) == (2, size // 2)
        mine = attention.positions(case.q_tokens)
        traced.trace.clear()
        out, saved = attention.forward(q[:, :, mine], k[:, :, mine], v[:, :, mine])
        peers = [event.peer for event in traced.trace.events if event.kind == "receive"]
        # The message from the other host comes first of all, and is posted before the first step of the window.
        assert [(peer - rank) % 2 for peer in peers] == [1] + [0] * (size - 2)
        forward = received(traced)
        gradients = attention.backward(d_out[:, :, mine], saved)
        crossing = [e for e in traced.trace.events if e.kind == "receive" and (e.peer - rank) % 2]
        assert [event.name for event in crossing] == ["KV", "D_KV"]
        check("out", out, oracle.attention(q, k, v, case.mask)[0][:, :, mine], case.dtype)
        for what, value, expected in zip("qkv", gradients, oracle.gradients(q, k, v, d_out, case.mask), strict=True):
            check(f"d_{what}", value, expected[:, :, mine], case.dtype)
        assert attention.problem is not None
        costs = COSTS["double_ring"](attention.problem, rank, outer=2, order=attention.order)
        assert (forward, received(traced)) == (costs.forward, costs.backward)


@pytest.mark.mpi(sizes=[6])
def test_unequal_hosts(comm: MPI.Intracomm) -> None:
    """Hosts of 4 and 2 ranks make rows of 2, none of them on two hosts."""
    with DoubleRingAttention(Hosts(comm, [0, 1, 0, 0, 1, 0])) as attention:
        assert (attention.outer, attention.inner, attention.order) == (3, 2, [0, 2, 3, 5, 1, 4])


@pytest.mark.mpi(min_size=2)
def test_wrong_outer(comm: MPI.Intracomm) -> None:
    with pytest.raises(ValueError, match="choose from"):
        DoubleRingAttention(comm, outer=comm.Get_size() + 1)


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
@pytest.mark.parametrize("combine", ["allreduce", "tree"])
@pytest.mark.parametrize("shape", ["uneven", "one", "given"])
def test_decode(comm: MPI.Intracomm, shape: str, combine: str) -> None:
    """The last tokens attend to shards of any lengths: the same bits on every rank, traffic by the formula."""
    rank = comm.Get_rank()
    masks = (Full(), Causal(), SlidingWindow(3), SlidingWindow(6, 1), Documents([9, 8]) & Causal())
    for number, (mask, new) in enumerate(itertools.product(masks, (1, 3))):
        case = Case(q_tokens=17, kv_tokens=17, mask=mask, heads=4, kv_heads=(4, 1)[number % 2], v_head_dim=3)
        case.dtype = ("float64", "float32", "bfloat16")[number % 3]
        q, k, v, d_out = case.arrays()
        shards = cache(comm.Get_size(), 17, shape)
        mine, queries = shards[rank], np.arange(17 - new, 17)
        traced = TracedComm(comm)
        with DecodeAttention(traced, mask=mask, combine=combine) as attention:
            traced.trace.clear()
            given = mine if shape == "given" else None
            out, saved = attention.forward(q[:, :, queries], k[:, :, mine], v[:, :, mine], given)
            forward = received(traced)
            d_q, d_k, d_v = attention.backward(d_out[:, :, queries], saved)
            costs = COSTS["decode"](attention.problem, rank, combine)
            assert (forward, received(traced)) == (costs.forward, costs.backward)
        right_out, right_lse = oracle.attention(q, k, v, mask, None, queries)
        right_q, right_k, right_v = oracle.gradients(q, k, v, d_out[:, :, queries], mask, None, queries)
        for what, value, expected in (
            ("out", out, right_out),
            ("lse", saved.lse, right_lse),
            ("d_q", d_q, right_q),
            ("d_k", d_k, right_k[:, :, mine]),
            ("d_v", d_v, right_v[:, :, mine]),
        ):
            check(what, value, expected, case.dtype)
        bits = b"".join(np.ascontiguousarray(array).tobytes() for array in (out, saved.lse, d_q))
        assert len(set(comm.allgather(bits))) == 1


@pytest.mark.mpi(min_size=2)
def test_decode_leaves_out_ranks(comm: MPI.Intracomm) -> None:
    """With a window inside the last shard, one partial result goes up the tree, and the result comes down."""
    size = comm.Get_size()
    q, k, v, _ = Case(q_tokens=1, kv_tokens=8 * size).arrays()
    traced = TracedComm(comm)
    with DecodeAttention(traced, mask=SlidingWindow(5), combine="tree") as attention:
        mine = attention.positions(8 * size)
        traced.trace.clear()
        attention.forward(q, k[:, :, mine], v[:, :, mine])
    messages = comm.allgather(received(traced).messages)
    assert sum(messages) == (size - 1) + bin(size - 1).count("1")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wrong", ["numbers", "tokens", "one rank", "order", "too many", "layout", "combine"])
def test_decode_bad_input(comm: MPI.Intracomm, wrong: str) -> None:
    rank = comm.Get_rank()
    last = rank == comm.Get_size() - 1
    q, k, v, _ = Case(q_tokens=2, kv_tokens=5).arrays()
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
            options["combine"], message = "star", "choose from allreduce, tree"
    with pytest.raises(ValueError, match=message) as caught, DecodeAttention(comm, **options) as attention:
        attention.forward(q, k, v, positions)
    assert len(set(comm.allgather(str(caught.value)))) == 1
