"""Messages of device memory, on a device that is the host: when they are posted, staging, collectives."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpiattn.messages.connection import on_device, private
from mpiattn.messages.device import pinned
from mpiattn.messages.device.channel import Channel, Transfer
from mpiattn.messages.device.comm import DeviceComm
from mpiattn.messages.message import Tag, Testall, Waitall, constant
from mpiattn.messages.reduction import all_reduce, maximum
from mpiattn.trace.comm import TracedComm


class Memory:
    """As much of a CuPy array as messages use; its bytes are a NumPy array's."""

    def __init__(self, array: Any) -> None:
        self.host = np.asarray(array)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def __array_namespace__(self) -> Any:
        return XP

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.host.ctypes.data)

    def __getitem__(self, index: Any) -> Memory:
        return Memory(self.host[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[index] = value.host if isinstance(value, Memory) else value

    def __iadd__(self, other: Any) -> Memory:
        self.host += other.host
        return self

    def reshape(self, *shape: Any) -> Memory:
        return Memory(self.host.reshape(*shape))

    def view(self, dtype: Any) -> Memory:
        return Memory(self.host.view(dtype))


class Event:
    """Passes when the test says so."""

    behind = False

    def __init__(self, **options: Any) -> None:
        self.late = Event.behind

    def record(self, stream: Any = None) -> None: ...

    @property
    def done(self) -> bool:
        return not (self.late and Event.behind)


def memcpy(to: int, source: int, size: int, kind: int, stream: int) -> None:
    ctypes.memmove(to, source, size)


XP: Any = SimpleNamespace(
    __name__="host",
    maximum=lambda a, b, out: np.maximum(a.host, b.host, out=out.host),
    empty=lambda size, dtype: Memory(np.empty(size, dtype)),
    cuda=SimpleNamespace(
        Event=Event,
        Stream=lambda non_blocking: SimpleNamespace(ptr=0),
        alloc_pinned_memory=bytearray,
        runtime=SimpleNamespace(memcpyAsync=memcpy, hostRegister=lambda address, size, flags: None),
    ),
)


@pytest.fixture(params=["device", "shared", "network"])
def around(request: pytest.FixtureRequest, comm: Any, monkeypatch: pytest.MonkeyPatch) -> DeviceComm:
    monkeypatch.setattr(pinned, "PIECE", 1000)
    monkeypatch.setattr("mpiattn.messages.device.comm.LARGEST", 2500)
    monkeypatch.setattr(pinned.Segment, "known", {})
    channel = Channel(comm, XP, "device" if request.param == "device" else "host")
    if request.param == "network":
        channel.segment = None
    return DeviceComm(comm, channel)


@pytest.mark.mpi
def test_messages_of_any_size_arrive_in_order(around: DeviceComm) -> None:
    rank, size = around.Get_rank(), around.Get_size()
    sizes = [0, 1, 999, 1000, 1001, 2500, 12345]
    sent = [Memory(np.full(n, rank * 10 + i, np.uint8)) for i, n in enumerate(sizes)]
    got = [Memory(np.zeros(n, np.uint8)) for n in sizes]
    requests = [around.Irecv(part, (rank - 1) % size, Tag.KV) for part in got]
    requests += [around.Isend(part, (rank + 1) % size, Tag.KV) for part in sent]
    Waitall(requests)
    for i, part in enumerate(got):
        assert (part.host == (rank - 1) % size * 10 + i).all()
    assert around.channel.under_way == []


@pytest.mark.mpi
def test_nothing_is_posted_before_the_device_has_come_to_it(comm: Any) -> None:
    around = DeviceComm(comm, Channel(comm, XP, "device"))
    rank, size = comm.Get_rank(), comm.Get_size()
    sent, got = Memory(np.full(10, 1, np.uint8)), Memory(np.zeros(10, np.uint8))
    Event.behind = True
    try:
        requests = [around.Irecv(got, (rank - 1) % size, Tag.Q), around.Isend(sent, (rank + 1) % size, Tag.Q)]
        assert not Testall(requests)
        sent.host[:] = 2  # the device has not come to the message: this goes first
        comm.Barrier()
        assert not Testall(requests)
    finally:
        Event.behind = False
    Waitall(requests)
    assert (got.host == 2).all()


@pytest.mark.mpi
def test_waiting_for_one_message_brings_on_the_others(around: DeviceComm) -> None:
    rank, size = around.Get_rank(), around.Get_size()
    first, second = (Memory(np.zeros(5000, np.uint8)) for _ in range(2))
    far = [around.Irecv(first, (rank - 1) % size, Tag.KV), around.Isend(Memory(np.ones(5000, np.uint8)), (rank + 1) % size, Tag.KV)]  # fmt: skip # noqa: E501
    near = [around.Irecv(second, (rank + 1) % size, Tag.O), around.Isend(Memory(np.ones(5000, np.uint8)), (rank - 1) % size, Tag.O)]  # fmt: skip # noqa: E501
    Waitall(near)
    Waitall(far)
    assert first.host.all() and second.host.all()


@pytest.mark.mpi
def test_collectives(around: DeviceComm) -> None:
    rank, size = around.Get_rank(), around.Get_size()
    counts = [(other * 3 + 1) * 4 for other in range(size)]
    whole = Memory(np.zeros(sum(counts), np.uint8))
    Waitall([around.Iallgatherv(Memory(np.full(counts[rank], rank + 1, np.uint8)), [whole, counts, None, None])])
    assert (whole.host == np.repeat(np.arange(size) + 1, counts)).all()
    sent, got = Memory(np.full(5 * size, rank, np.uint8)), Memory(np.full(8 * size, 99, np.uint8))
    places = [8 * other for other in range(size)]
    around.Alltoallv([sent, [5] * size, None, None], [got, [5] * size, places, None])
    assert (got.host.reshape(size, 8)[:, :5] == np.arange(size)[:, None]).all() and (got.host == 99).sum() == 3 * size
    got[8 * rank] = rank + 50
    around.Allgatherv(constant("IN_PLACE"), [got, [1] * size, places, None])
    assert (got.host.reshape(size, 8)[:, 0] == np.arange(size) + 50).all()


@pytest.mark.mpi
def test_reductions(around: DeviceComm) -> None:
    rank, size = around.Get_rank(), around.Get_size()
    total: Any = Memory(np.full((7, 300), rank + 1.0))
    all_reduce(around, total)
    assert (total.host == size * (size + 1) / 2).all()
    top: Any = Memory(np.arange(5.0) * (-1) ** rank)
    all_reduce(around, top, maximum)
    assert (top.host == (np.arange(5) if size > 1 or rank == 0 else 0)).all()


@pytest.mark.mpi
def test_numpy_arrays_pass_untouched(around: DeviceComm) -> None:
    rank, size = around.Get_rank(), around.Get_size()
    got = np.zeros(3)
    Waitall([around.Irecv(got, (rank - 1) % size, Tag.Q), around.Isend(np.full(3, 7.0), (rank + 1) % size, Tag.Q)])
    assert (got == 7).all() and isinstance(around.Isend(got[:0], rank, Tag.Q), Transfer)
    Waitall([around.Irecv(got[:0], rank, Tag.Q)])


@pytest.mark.mpi
def test_what_carries_device_memory_is_made_once_for_each_communicator(comm: Any) -> None:
    traced = private(TracedComm(comm))
    carrier, channel = on_device(traced, XP, "device")
    assert isinstance(carrier, TracedComm) and isinstance(carrier.comm, DeviceComm) and carrier.comm.channel is channel
    bare, same = on_device(private(comm), XP, "device")
    assert bare is carrier.comm and same is channel
    ring = bare.Create_cart([comm.Get_size()], periods=[True])
    assert isinstance(ring, DeviceComm) and ring.comm is private(comm).Create_cart([comm.Get_size()], periods=[True])
    assert bare.Create_cart([comm.Get_size()], periods=[True]) is ring and ring.channel is channel
    assert ring.Sub([True]) is ring.Sub([True]) and ring.Sub([True]) is not ring
    other, _ = on_device(private(comm), XP, "host")
    assert other is not bare and other.channel is not channel
