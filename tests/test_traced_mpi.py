"""Traced communicators of MPI: an ordinary mpi4py program runs on them, and what they can't count they name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import Causal, RingAttention
from mpiattn.commands.trace import report
from mpiattn.trace import file
from mpiattn.trace.buffers import even_pieces, nbytes, pieces
from mpiattn.trace.clocks import gather
from mpiattn.trace.comm import TracedComm
from mpiattn.trace.events import Trace

if TYPE_CHECKING:
    from pathlib import Path

    from mpi4py import MPI

# Calls of a communicator that move no data, or none that counts.
QUIET = """
Abort Ack_failed Agree Attach_buffer Barrier Barrier_init Call_errhandler Cart_map Compare Create_errhandler
Create_from_group Create_keyval Delete_attr Detach_buffer Disconnect Flush_buffer Free_keyval Get_attr Get_dim
Get_errhandler Get_failed Get_group Get_info Get_name Get_parent Get_topo Get_topology Graph_map Iagree Ibarrier
Iflush_buffer Iprobe Is_inter Is_intra Is_revoked Probe Revoke Set_attr Set_errhandler Set_info Set_name
barrier f2py free fromhandle fromint iprobe is_inter is_intra is_topo probe py2f toint
"""


def traced(comm: Any) -> Any:
    return TracedComm(comm, Trace(agreements=False))


@pytest.mark.mpi(sizes=[1])
def test_every_call_of_mpi_is_counted_or_noted_or_moves_nothing(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    from mpiattn.trace.mpi_comm import TracedCartcomm

    calls = {name for name in dir(MPI.Cartcomm) if name[0] != "_" and callable(getattr(MPI.Cartcomm, name))}
    inherited = {name for name in calls if getattr(TracedCartcomm, name) == getattr(MPI.Cartcomm, name)}
    assert not inherited - set(QUIET.split())
    completing = {name for name in dir(MPI.Request) if name.startswith(("Wait", "Test", "wait", "test"))}
    request = type(traced(comm).Isend(np.zeros(1), MPI.PROC_NULL))
    lower = {"waitall", "waitany", "waitsome", "testall", "testany", "testsome"}  # of pickled objects
    assert completing - lower <= {name for kind in request.__mro__[:1] for name in vars(kind)}


@pytest.mark.mpi(min_size=2, max_size=4)
def test_mpi_takes_them_as_its_own(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    over: Any = traced(comm)
    grid = over.Create_cart([over.size])
    row = grid.Sub([True])
    kinds = [(over, MPI.Intracomm), (grid, MPI.Cartcomm), (row, MPI.Cartcomm)]
    assert all(isinstance(one, kind) for one, kind in kinds)
    assert (over.rank, over.size, grid.dims, grid.coords) == (comm.rank, comm.size, [comm.size], [comm.rank])
    assert over.Clone().Get_size() == over.Dup().size == comm.size
    near, far = np.full(3, comm.rank, "i4"), np.empty(3, "i4")
    window = MPI.Win.Create(near, comm=over)
    window.Free()
    source, dest = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    for tag in (0, 1, 77):
        far[:] = -1
        requests = [row.Irecv(far, source, tag), row.Isend(near, dest, tag)]
        assert all(isinstance(request, MPI.Request) for request in requests)
        MPI.Request.Waitall(requests)
        assert (far == source).all() and all(request == MPI.REQUEST_NULL for request in requests)
    assert over.trace.received() == (3, 36)
    assert over.trace.unseen() == 6  # completed where no trace sees it
    assert {event.name for event in over.trace.events} == {"tag 0", "tag 1", "tag 77"}
    assert {event.peer for event in over.trace.events if event.kind == "receive"} == {source}
    row.Free()
    assert not row
    grid.Free()


@pytest.mark.mpi(min_size=2, max_size=4)
def test_requests_have_all_ways_to_complete(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    source, dest = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    near, far = np.full(3, comm.rank, "f8"), np.empty(5, "f8")  # there is room for more

    def until(test: Callable[[], Any]) -> None:
        while not test():
            pass

    def each(complete: Callable[[Any], Any], requests: Any) -> None:
        for request in requests:
            complete(request)

    ways: dict[str, Callable[[Any], Any]] = {
        "Wait": partial(each, lambda one: one.Wait()),
        "wait": partial(each, lambda one: one.wait()),
        "Test": partial(each, lambda one: until(one.Test)),
        "test": partial(each, lambda one: until(lambda: one.test()[0])),
        "Waitall": lambda r: type(r[0]).Waitall(r),
        "Testall": lambda r: until(lambda: type(r[0]).Testall(r)),
        "Waitany": lambda r: {type(r[0]).Waitany(r) for _ in r} == {0, 1} or pytest.fail("each once"),
        "Testany": lambda r: until(lambda: type(r[0]).Testany(r) == (MPI.UNDEFINED, True)),
        "Waitsome": lambda r: until(lambda: type(r[0]).Waitsome(r) is None),
        "Testsome": lambda r: until(lambda: type(r[0]).Testsome(r) is None),
    }
    for name, complete in ways.items():
        over = traced(comm)
        requests = [over.Irecv(far, MPI.ANY_SOURCE, MPI.ANY_TAG), over.Isend(near, dest, 5)]
        complete(requests)
        comm.Barrier()
        assert over.trace.unseen() == 0, name
        assert over.trace.received() == (1, 24), name  # what came, not what there was room for
        received = next(event for event in over.trace.events if event.kind == "receive")
        assert (received.peer, received.name) == (source, "tag 5"), name
        assert (over.trace.waited() > 0) == name.lower().startswith("wait"), name


@pytest.mark.mpi(min_size=2, max_size=4)
def test_a_cancelled_receive_brings_nothing(comm: MPI.Intracomm) -> None:
    over = traced(comm)
    request = over.Irecv(np.empty(4), 0, 9)
    request.Cancel()
    request.Wait()
    assert over.trace.received() == (0, 0)


CALLS: dict[str, tuple[Callable[[Any, Any, int], Any], Callable[[int, int], tuple[int, int]]]] = {
    # What is called with communicator, MPI and the next rank, and what rank r of n receives: messages, bytes.
    "Send": (lambda c, M, d: ring(c, d, c.Send), lambda r, n: (1, 24)),
    "Ssend": (lambda c, M, d: ring(c, d, c.Ssend), lambda r, n: (1, 24)),
    "Issend": (lambda c, M, d: ring(c, d, lambda *a: c.Issend(*a).Wait()), lambda r, n: (1, 24)),
    "Sendrecv": (
        lambda c, M, d: c.Sendrecv(np.zeros(3), d, 1, recvbuf=np.empty(9), source=M.ANY_SOURCE),
        lambda r, n: (1, 24),
    ),
    "Sendrecv_replace": (lambda c, M, d: c.Sendrecv_replace(np.zeros(3), d), lambda r, n: (1, 24)),
    "PROC_NULL": (
        lambda c, M, d: (c.Send(np.zeros(3), M.PROC_NULL), c.Irecv(np.zeros(3), M.PROC_NULL).Wait()),
        lambda r, n: (0, 0),
    ),
    "a datatype": (
        lambda c, M, d: c.Sendrecv([np.zeros(8), 2, M.DOUBLE], d, recvbuf=bytearray(99)),
        lambda r, n: (1, 16),
    ),
    "Allgather": (lambda c, M, d: c.Allgather(np.zeros(2), np.empty((c.size, 2))), lambda r, n: (n - 1, 16 * (n - 1))),
    "Iallgather": (
        lambda c, M, d: c.Iallgather(np.zeros(2), np.empty((c.size, 2))).Wait(),
        lambda r, n: (n - 1, 16 * (n - 1)),
    ),
    "Allgatherv": (
        lambda c, M, d: c.Allgatherv(np.zeros(c.rank), [np.empty(99), [*range(c.size)]]),
        lambda r, n: (n - (1 if r == 0 else 2), 8 * (n * (n - 1) // 2 - r)),
    ),
    "Alltoall": (
        lambda c, M, d: c.Alltoall(np.zeros(2 * c.size), np.zeros(2 * c.size)),
        lambda r, n: (n - 1, 16 * (n - 1)),
    ),
    "Bcast": (lambda c, M, d: c.Bcast(np.zeros(2), root=1), lambda r, n: (0, 0) if r == 1 else (1, 16)),
    "Ibcast": (lambda c, M, d: c.Ibcast(np.zeros(2), 1).Wait(), lambda r, n: (0, 0) if r == 1 else (1, 16)),
    "Gather": (
        lambda c, M, d: c.Gather(np.zeros(2), np.empty((c.size, 2)) if c.rank == 0 else None),
        lambda r, n: (n - 1, 16 * (n - 1)) if r == 0 else (0, 0),
    ),
    "Scatterv": (
        lambda c, M, d: c.Scatterv([np.zeros(2 * c.size), [2] * c.size] if c.rank == 1 else None, np.empty(2), root=1),
        lambda r, n: (0, 0) if r == 1 else (1, 16),
    ),
}


def ring(comm: Any, dest: int, send: Any) -> None:
    """Send round a ring by a blocking call, each receive posted first."""
    far = np.empty(3)
    request = comm.Irecv(far)
    send(np.zeros(3), dest)
    request.Wait()


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("name", CALLS)
def test_calls_whose_buffers_say_what_comes_are_counted(comm: MPI.Intracomm, name: str) -> None:
    from mpi4py import MPI

    call, right = CALLS[name]
    over = traced(comm)
    call(over, MPI, (comm.rank + 1) % comm.size)
    assert over.trace.received() == right(comm.rank, comm.size)
    assert not over.trace.uncounted and over.trace.unseen() == 0
    comm.Barrier()


@pytest.mark.mpi(min_size=2, max_size=4)
def test_all_other_calls_are_named(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    over, numbers = traced(comm), np.ones(2)
    over.Allreduce(MPI.IN_PLACE, numbers)
    assert over.allreduce(1) == comm.size
    assert over.bcast(comm.rank, root=1) == 1
    assert over.sendrecv("to", (comm.rank + 1) % comm.size) == "to"
    for _ in range(2):
        persistent = over.Recv_init(numbers, MPI.PROC_NULL)
        persistent.Start()
        persistent.Wait()
        persistent.Free()
    assert over.trace.received() == (0, 0)
    assert over.trace.uncounted == {"Allreduce": 1, "allreduce": 1, "bcast": 1, "sendrecv": 1, "Recv_init": 2}
    over.trace.clear()
    assert not over.trace.uncounted


@pytest.mark.mpi(min_size=2, max_size=3)
def test_the_agreement_of_this_package_is_no_traffic(comm: MPI.Intracomm) -> None:
    over = TracedComm(comm)
    over.Allgather(np.zeros(2), np.empty((comm.size, 2)))
    over.Bcast(np.zeros(2))
    over.allgather(1)
    assert over.trace.received() == (0, 0) and not over.trace.uncounted
    assert [event.kind for event in over.trace.events] == ["agree"] * 3


@pytest.mark.mpi(min_size=2, max_size=3)
def test_waits_that_nobody_saw_are_not_said_to_be_none(comm: MPI.Intracomm, mpi_tmp_path: Path) -> None:
    from mpi4py import MPI

    over = traced(comm)
    with over.trace.phase("ring"):
        requests = [over.Irecv(np.empty(4)), over.Isend(np.zeros(4), (comm.rank + 1) % comm.size)]
        MPI.Request.Waitall(requests)
    file.write(comm, over.trace, mpi_tmp_path / "t.json")
    traces = gather(comm, over.trace)
    if traces is not None:
        again = file.read(mpi_tmp_path / "t.json")
        for told in (traces, again):
            assert [trace.unseen() for trace in told] == [2] * comm.size
            table = report.summary(told)
            assert "unknown" in table and "completed by calls" in table


def test_virtual_ranks_keep_their_own_classes_and_load_no_mpi() -> None:
    program = """
import sys
from mpiattn import RingAttention, machines, virtual
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
virtual.run(3, machines.load("laptop"), lambda comm: check(RingAttention, comm, Case()))
assert not any(name.startswith("mpi4py.") for name in sys.modules), "MPI is loaded"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.mpi(min_size=2, max_size=3)
def test_nothing_is_left_of_a_ring_that_is_traced(comm: MPI.Intracomm) -> None:
    over = TracedComm(comm)
    with RingAttention(over, mask=Causal()) as attention:
        q = np.zeros((1, 1, len(attention.positions(12)), 4))
        _, saved = attention.forward(q, q, q)
        attention.backward(q, saved)
    assert over.trace.unseen() == 0 and not over.trace.uncounted


@pytest.mark.mpi(sizes=[1])
def test_bytes_of_a_buffer_in_every_form(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    array, vector = np.zeros(12, "f4"), MPI.FLOAT.Create_vector(2, 1, 3).Commit()
    forms: dict[int, list[Any]] = {
        48: [array, [array, MPI.FLOAT], [array, 12], [array, "f"], (array, None, None), [array, (12, 0), MPI.FLOAT]],
        20: [[array, 5], [array, 5, MPI.FLOAT], [array, (5, 2)], [array, 5, 2, MPI.FLOAT], bytes(20), bytearray(20)],
        24: [[array, (None, 6)], [array, [6, 1], "f"], [array, 3, vector], memoryview(bytearray(24))],
    }
    for right, arguments in forms.items():
        for argument in arguments:
            assert nbytes(argument) == right, argument
            request = comm.Isend(argument, 0)  # what MPI itself says
            status, target = MPI.Status(), bytearray(200)
            comm.Recv(target, 0, status=status)
            request.Wait()
            assert status.Get_count(MPI.BYTE) == right, argument
    assert even_pieces(array, 3) == [16, 16, 16] and even_pieces([array, 2, MPI.FLOAT], 3) == [8, 8, 8]
    assert pieces(array, 5) == [12, 12, 8, 8, 8]
    assert pieces([array, [1, 0, 3]], 3) == pieces([array, ([1, 0, 3], [0, 1, 1])], 3) == [4, 0, 12]
    assert pieces([array, [1, 2], None, MPI.DOUBLE], 2) == [8, 16] and pieces([array, 2, MPI.FLOAT], 2) == [8, 8]
