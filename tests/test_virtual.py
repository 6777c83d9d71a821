"""The virtual cluster: its times by hand, its ends, and the algorithms' own results on it."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import machines, virtual
from mpiattn.algorithms import ALGORITHMS
from mpiattn.conformance.case import Case, fast, problem
from mpiattn.conformance.check import check
from mpiattn.conformance.player import Refused
from mpiattn.costs import COSTS
from mpiattn.machines.machine import Link, Machine, Rates
from mpiattn.messages.message import Tag, Testall, Waitall
from mpiattn.planner import Candidate, Task, simulate
from mpiattn.problems.dropout import Dropout
from mpiattn.problems.mask import Causal, Full, Mask
from mpiattn.virtual import VirtualComm
from mpiattn.virtual import arrays as virtual_arrays

if TYPE_CHECKING:
    from mpi4py import MPI

# Messages take 1 s + 1 s a byte inside a node of 2 ranks, 10 s + 2 s a byte beyond; the kernel does 1 flop a second.
PLAIN = Machine(
    name="plain",
    ranks_per_node=2,
    memory=1e9,
    memory_bandwidth=float("inf"),
    links={"node": Link(1.0, 1.0), "network": Link(10.0, 0.5)},
    compute={"float64": Rates((1,), (1.0,), (1.0,))},
)


def one_host(ranks: int) -> Machine:
    """Return a machine that holds all ranks on one host."""
    return dataclasses.replace(machines.load("laptop"), ranks_per_node=ranks)


def pass_bytes(*ways: tuple[int, int, int]) -> Any:
    """Return a program that sends (source, dest, bytes) and returns each rank's time."""

    def program(comm: VirtualComm) -> float:
        requests = []
        for source, dest, nbytes in ways:
            if comm.Get_rank() == dest:
                requests.append(comm.Irecv(np.zeros(nbytes, np.uint8), source, Tag.Q))
            if comm.Get_rank() == source:
                requests.append(comm.Isend(np.ones(nbytes, np.uint8), dest, Tag.Q))
        Waitall(requests)
        return comm.me.clock

    return program


def test_a_message_takes_latency_and_bytes() -> None:
    assert virtual.run(2, PLAIN, pass_bytes((0, 1, 5))) == [5, 6]
    assert virtual.run(4, PLAIN, pass_bytes((0, 2, 5))) == [10, 0, 20, 0]


def test_a_port_sends_one_message_after_the_other_and_receives_meanwhile() -> None:
    assert virtual.run(2, PLAIN, pass_bytes((0, 1, 5), (0, 1, 5), (1, 0, 5))) == [10, 11]


def test_half_duplex_ports_do_one_at_a_time() -> None:
    half = dataclasses.replace(PLAIN, duplex=False)
    assert max(virtual.run(2, half, pass_bytes((0, 1, 5), (1, 0, 5)))) == 11
    assert max(virtual.run(2, PLAIN, pass_bytes((0, 1, 5), (1, 0, 5)))) == 6


def test_ranks_of_a_node_share_its_cards() -> None:
    one = dataclasses.replace(PLAIN, links={**PLAIN.links, "network": Link(10.0, 0.5, cards=1)})
    two = dataclasses.replace(PLAIN, links={**PLAIN.links, "network": Link(10.0, 0.5, cards=2)})
    ways = pass_bytes((0, 2, 5), (1, 3, 5))
    assert max(virtual.run(4, one, ways)) == 30
    assert max(virtual.run(4, two, ways)) == 20


def test_collectives_of_several_groups_share_the_cards_of_a_node() -> None:
    """Ranks 0, 2 and ranks 1, 3 gather over one card a node: all they receive from the other node comes in turn."""
    one = dataclasses.replace(PLAIN, links={**PLAIN.links, "network": Link(0.0, 0.5, cards=1)})

    def program(comm: VirtualComm, groups: int) -> float:
        own = comm.Split(comm.Get_rank() % groups)
        start = comm.me.clock
        own.Allgather(np.zeros(5, np.uint8), np.empty(5 * own.Get_size(), np.uint8))
        return comm.me.clock - start

    assert max(virtual.run(4, one, partial(program, groups=2))) == 20
    assert max(virtual.run(4, one, partial(program, groups=1))) == 30  # three messages, one into a node at a time


def test_ranks_of_a_node_share_its_memory() -> None:
    four = dataclasses.replace(PLAIN, ranks_per_node=4, links={**PLAIN.links, "node": Link(1.0, 1.0, shared=1.0)})
    assert max(virtual.run(4, four, pass_bytes((0, 1, 5), (2, 3, 5)))) == 11


def test_a_pass_over_memory_takes_its_bytes_or_what_it_costs_to_start() -> None:
    machine = dataclasses.replace(PLAIN, memory_bandwidth=2.0, launch=3.0)

    def program(comm: VirtualComm) -> list[float]:
        times = [comm.me.clock]
        for size in (4, 40):
            virtual_arrays.zeros(size, np.int8)
            times.append(comm.me.clock)
        return times

    assert virtual.run(1, machine, program) == [[0, 3, 23]]


def test_a_message_waits_for_its_receive_unless_it_is_small() -> None:
    def program(comm: VirtualComm) -> float:
        if comm.Get_rank() == 0:
            comm.Isend(np.zeros(5, np.uint8), 1, Tag.Q).Wait()
        else:
            comm.me.compute(100)
            comm.Irecv(np.zeros(5, np.uint8), 0, Tag.Q).Wait()
        return comm.me.clock

    assert virtual.run(2, PLAIN, program) == [105, 106]
    assert virtual.run(2, dataclasses.replace(PLAIN, eager=6), program) == [0, 100]


@pytest.mark.parametrize(("progress", "seconds"), [(True, 100), (False, 106)])
def test_messages_travel_during_compute_only_where_mpi_progresses(progress: bool, seconds: float) -> None:
    def program(comm: VirtualComm) -> float:
        mine, other = np.zeros(5, np.uint8), 1 - comm.Get_rank()
        requests = [comm.Irecv(mine, other, Tag.Q), comm.Isend(np.ones(5, np.uint8), other, Tag.Q)]
        comm.me.compute(100)
        Waitall(requests)
        assert mine.all()
        return comm.me.clock

    assert virtual.run(2, dataclasses.replace(PLAIN, progress=progress), program) == [seconds] * 2


def test_polling_ends() -> None:
    def program(comm: VirtualComm) -> bool:
        request = (comm.Irecv if comm.Get_rank() else comm.Isend)(np.zeros(5, np.uint8), 1 - comm.Get_rank(), Tag.Q)
        while not Testall([request]):
            pass
        return True

    fast = dataclasses.replace(PLAIN, links={"network": Link(0.0, 1e3)})
    assert virtual.run(2, fast, program) == [True, True]


def test_what_waits_for_ever_is_named() -> None:
    def program(comm: VirtualComm) -> None:
        if comm.Get_rank() == 1:
            comm.Irecv(np.zeros(5, np.uint8), 0, Tag.KV).Wait()

    with pytest.raises(
        RuntimeError, match=r"1 ranks wait for ever: rank 1 for a message from rank 0 to rank 1 with tag 2"
    ):
        virtual.run(2, PLAIN, program)


def test_a_message_without_a_partner_is_named() -> None:
    def program(comm: VirtualComm) -> None:
        if comm.Get_rank() == 1:
            comm.Irecv(np.zeros(5, np.uint8), 0, Tag.KV)

    with pytest.raises(RuntimeError, match=r"message from rank 0 to rank 1 with tag 2 has no partner"):
        virtual.run(2, PLAIN, program)


def test_collectives_that_differ_are_named() -> None:
    def program(comm: VirtualComm) -> None:
        if comm.Get_rank() == 1:
            comm.Barrier()
        else:
            comm.allgather(1)

    with pytest.raises(RuntimeError, match="calls Barrier, where others have called allgather"):
        virtual.run(2, PLAIN, program)


def test_an_exception_on_one_rank_ends_the_run() -> None:
    def program(comm: VirtualComm) -> None:
        if comm.Get_rank() == 1:
            raise KeyError("here")
        comm.Barrier()

    with pytest.raises(KeyError, match="here"):
        virtual.run(3, PLAIN, program)


def test_a_receive_that_is_too_small_is_named() -> None:
    def program(comm: VirtualComm) -> None:
        if comm.Get_rank() == 0:
            comm.Isend(np.zeros(6, np.uint8), 1, Tag.Q).Wait()
        else:
            comm.Irecv(np.zeros(5, np.uint8), 0, Tag.Q).Wait()

    with pytest.raises(ValueError, match="receives 5 bytes from rank 0, which sends 6"):
        virtual.run(2, PLAIN, program)


def test_grids_and_groups() -> None:
    def program(comm: VirtualComm) -> Any:
        grid = comm.Create_cart([2, 3], periods=[True, True])
        row, col = grid.Sub([False, True]), grid.Sub([True, False])
        odd = comm.Split(comm.Get_rank() % 2, -comm.Get_rank())
        edge = comm.Create_cart([6], periods=[False]).Shift(0, 1)
        return grid.Get_coords(grid.Get_rank()), row.Shift(0, 1), col.Get_size(), odd.allgather(comm.Get_rank()), edge

    results = virtual.run(6, PLAIN, program)
    assert results[4] == ([1, 1], (0, 2), 2, [4, 2, 0], (3, 5))
    assert results[0][4] == (-1, 1)
    assert results[5][4] == (4, -1)


def attend(
    name: str, tokens: int, ranks: int, machine: Machine, mask: Mask, dtype: str = "float64", **arguments: Any
) -> list[tuple[float, int, int]]:
    """Return each rank's time, bytes received and most bytes held, forward and backward, without data."""

    def program(comm: VirtualComm) -> tuple[float, int, int]:
        with ALGORITHMS[name](comm, mask=mask, **arguments) as attention:
            shape = (1, 2, len(attention.positions(tokens)), 4)
            q, k, v = (virtual.empty(shape, dtype) for _ in "qkv")
            out, saved = attention.forward(q, k, v)
            attention.backward(virtual.empty(out.shape, dtype), saved)
        return comm.me.clock, comm.me.received, comm.me.peak

    return virtual.run(ranks, machine, program)


def test_ring_takes_the_time_of_its_blocks_where_messages_are_fast() -> None:
    fast = dataclasses.replace(PLAIN, links={"network": Link(0.0, float("inf"))})
    tokens, ranks, heads, dim = 24, 4, 2, 4
    # 4 dim operations a pair and head forward, 10 dim backward
    seconds = 14 * dim * heads * (tokens // ranks) * tokens
    assert {clock for clock, *_ in attend("ring", tokens, ranks, fast, Full())} == {seconds}


def test_the_same_run_gives_the_same_times() -> None:
    runs = [attend("mesh", 37, 6, PLAIN, Causal(), rows=3, cols=2, layout="striped") for _ in range(2)]
    assert runs[0] == runs[1]


WITHOUT_DATA = [name for name in ALGORITHMS if name != "shared_ring"]  # which works in the memory of a host


@pytest.mark.parametrize("name", WITHOUT_DATA)
@pytest.mark.parametrize("tokens", [37, 3])
def test_arrays_without_data_receive_the_bytes_of_the_formula(name: str, tokens: int) -> None:
    ranks = 4
    for arguments in ALGORITHMS[name].variants(ranks):
        problems: list[Any] = []

        def program(comm: VirtualComm, given: dict[str, Any] = arguments, seen: list[Any] = problems) -> int:
            with ALGORITHMS[name](comm, mask=Causal(), **given) as attention:
                shapes = {"q": (1, 4, tokens, 8), "k": (1, 2, tokens, 8), "v": (1, 2, tokens, 8)}
                own = {}
                for key, shape in shapes.items():
                    whole = np.empty(shape)
                    own[key] = virtual.empty(whole[attention.owned(key, shapes)(shape, comm.Get_rank())].shape, float)
                out, saved = attention.forward(own["q"], own["k"], own["v"])
                attention.backward(virtual.empty(out.shape, float), saved)
                seen.append(attention.problem)
            return comm.me.received

        received = virtual.run(ranks, machines.load("laptop"), program)
        formula = [COSTS[name](problems[0], rank, **arguments) for rank in range(ranks)]
        assert received == [cost.forward.nbytes + cost.backward.nbytes for cost in formula]


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_sinks_and_dropout_without_data(name: str) -> None:
    ranks, shapes = 4, {"q": (1, 8, 21, 16), "k": (1, 4, 21, 16), "v": (1, 4, 21, 12), "out": (1, 8, 21, 12)}

    def program(comm: VirtualComm, arguments: dict[str, Any], sinks: bool) -> float:
        with ALGORITHMS[name](comm, mask=Causal(), softcap=20.0, **arguments) as attention:
            places = {key: np.empty(shape)[attention.owned(key, shapes)(shape, comm.Get_rank())].shape
                      for key, shape in shapes.items()}  # fmt: skip
            q, k, v, d_out = (virtual.empty(shape, "float32") for shape in places.values())
            heads = q.shape[1:2]
            features: Any = {"sinks": virtual.empty(heads, "float32")} if sinks else {}
            out, saved = attention.forward(q, k, v, dropout=Dropout(0.1, 1), **features)
            d_q, d_k, d_v = attention.backward(d_out, saved)
            assert [a.shape for a in (d_q, d_k, d_v, out)] == list(places.values())
            assert not sinks or attention.sink_gradient(d_out, saved).shape == out.shape[1:2]
        return comm.me.clock

    for arguments in ALGORITHMS[name].variants(ranks):
        plain, more = (
            max(virtual.run(ranks, machines.load("laptop"), partial(program, arguments=arguments, sinks=sinks)))
            for sinks in (False, True)
        )
        assert more > plain


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "seconds"), [(256, 10), (1024, 60)])
def test_a_ring_of_a_thousand_ranks_takes_less_than_a_minute(ranks: int, seconds: float) -> None:
    task, start = Task(tokens=2**20, heads=32, kv_heads=8, head_dim=128), time.process_time()
    simulate(task, machines.load("h200-ib"), ranks, Candidate("ring"))
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 2e9


def conform(ranks: int, factory: Any, case: Case, traffic: Any = None) -> None:
    """Check an algorithm on virtual ranks against the oracle."""
    virtual.run(ranks, one_host(ranks), lambda comm: check(factory, comm, case, traffic))


@pytest.mark.parametrize("ranks", range(1, 10))
def test_conformance_in_one_process(ranks: int) -> None:
    for name in ALGORITHMS:
        for arguments in ALGORITHMS[name].variants(ranks):
            factory = partial(ALGORITHMS[name], **arguments)
            for case in fast()[:: 4 if ranks in (4, 6) else 7]:
                with contextlib.suppress(Refused):
                    conform(ranks, factory, case)


@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("name", ["ring", "double_ring", "mesh", "ulysses"])
def test_conformance_on_many_ranks(name: str, ranks: int) -> None:
    case = Case(tokens=130, dtype="float64")
    for arguments in ALGORITHMS[name].variants(ranks)[1:3] or [{}]:
        factory = partial(ALGORITHMS[name], **arguments)
        conform(ranks, factory, case, partial(COSTS[name], **arguments))


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "mask"), [("zigzag", "causal"), ("contiguous", "window=40")])
def test_the_same_bits_as_under_mpi(comm: MPI.Intracomm, name: str, dtype: str, layout: str, mask: str) -> None:
    case = Case(layout, mask, tokens=150, heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype=dtype)
    given = {key: problem(case)[0][key] for key in ("q", "k", "v", "out")}

    def program(comm: Any, arguments: dict[str, Any]) -> list[bytes]:
        with ALGORITHMS[name](comm, **case.options, **arguments) as attention:
            shapes = {key: whole.shape for key, whole in given.items()}
            own = [
                np.ascontiguousarray(whole[attention.owned(key, shapes)(whole.shape, comm.Get_rank())])
                for key, whole in given.items()
            ]
            out, saved = attention.forward(*own[:3])
            results = [out, saved.lse, *attention.backward(own[3], saved)]
            _, saved = attention.forward(*own[:3], sinks=np.ones(own[0].shape[1]))
            results.append(attention.sink_gradient(own[3], saved))
            if name == "tensor_parallel":
                results.append(attention.project(out, np.ones((out.shape[1] * 16, 5))))
            return [array.tobytes() for array in results]

    different = []
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):
        real = program(comm, arguments)
        imitated = virtual.run(comm.Get_size(), one_host(comm.Get_size()), partial(program, arguments=arguments))
        if imitated[comm.Get_rank()] != real:
            different.append(arguments)
    assert not different


def test_no_mpi_is_needed() -> None:
    code = """
import sys
sys.modules["mpi4py.MPI"] = sys.modules["mpi4py"] = None
from mpiattn import machines, virtual
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
from mpiattn.algorithms import RingAttention
virtual.run(3, machines.load("laptop"), lambda comm: check(RingAttention, comm, Case()))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
