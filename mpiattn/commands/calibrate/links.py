"""Messages between ranks: latency, bandwidth, what it takes to post one, and which leave before their receive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np

from ...arrays import Array
from ...machines.machine import Link
from ...messages.message import Communicator, Request, Tag, Testall, Waitall
from .. import gpu

SMALL = 8
"""Bytes of the messages whose time is the latency."""

Pair = tuple[int, int] | None
"""Ranks from which a rank receives and to which it sends; None: it takes no part."""


def measure(
    comm: Communicator, hosts: list[tuple[int, ...]], nbytes: int, rounds: int, xp: ModuleType,
    progress: Callable[[], object],
) -> tuple[dict[str, Link], float]:  # fmt: skip
    """Return the links by level, and the seconds that it takes to post a message, on GPUs; `hosts` as of `grid`."""
    links, overhead, rank = {}, 0.0, comm.Get_rank()
    for level, pair in (("node", beside(hosts, rank, True)), ("network", beside(hosts, rank, False))):
        if any(pair is not None for pair in comm.allgather(pair)):
            links[level] = link(comm, pair, nbytes, rounds, xp)
            overhead = max(overhead, posting(comm, pair, nbytes, rounds, xp) if xp is not np else 0.0)
        progress()
    links.setdefault("network", links.get("node", Link(1e-6, 1e10)))
    per_node = max(map(len, hosts))
    if len(set(hosts)) > 1 and per_node > 1:  # all ranks of a host have sent at once: what one got is its share
        wire = links["network"]
        links["network"] = Link(wire.latency, wire.bandwidth * per_node, cards=1)
    return links, overhead


def beside(hosts: list[tuple[int, ...]], rank: int, same: bool) -> Pair:
    """Return (source, dest) on a ring through the hosts, or through the ranks of this one; None: not connected."""
    if same:
        ring = list(hosts[rank])
    else:  # the ranks with this place on their hosts, one a host
        place = hosts[rank].index(rank)
        ring = sorted({host[place] for host in hosts if len(host) > place})
    if len(ring) < 2:
        return None
    index = ring.index(rank)
    return ring[index - 1], ring[(index + 1) % len(ring)]


def link(comm: Communicator, pair: Pair, nbytes: int, rounds: int, xp: ModuleType) -> Link:
    """Return latency and bandwidth while every rank sends to the next one and receives from the one before."""
    times = {}
    for size in (SMALL, nbytes, 2 * nbytes):
        seconds = []
        arriving, leaving = xp.empty(size, np.uint8), xp.ones(size, np.uint8)
        repeat = 20 if size == SMALL else 1
        for _ in range(rounds + 1):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeat if pair else 0):
                Waitall(_post(comm, pair, arriving, leaving))
            seconds.append((time.perf_counter() - start) / repeat)
        # Each rank waits for its neighbour: the slowest of a round says how long the exchange took.
        ranks = [mine for mine in comm.allgather(seconds[1:] if pair else None) if mine]
        times[size] = statistics.median(max(one) for one in zip(*ranks, strict=True))
    slope = (times[2 * nbytes] - times[nbytes]) / nbytes
    if slope <= 0:
        slope = times[nbytes] / nbytes
    return Link(times[SMALL], 1 / slope)


def posting(comm: Communicator, pair: Pair, nbytes: int, rounds: int, xp: ModuleType) -> float:
    """Return the seconds that a rank spends to post a message."""
    seconds = []
    arriving, leaving = (xp.ones(nbytes, np.uint8) for _ in range(2))
    for _ in range(rounds + 1):
        gpu.wait(xp)
        comm.Barrier()
        start = time.perf_counter()
        requests = _post(comm, pair, arriving, leaving)
        seconds.append((time.perf_counter() - start) / 2)
        Waitall(requests)
    return float(max(comm.allgather(statistics.median(seconds[1:]))))


def _post(comm: Communicator, pair: Pair, arriving: Array, leaving: Array) -> list[Request]:
    """Post a receive and a send, where the rank takes part."""
    if pair is None:
        return []
    source, dest = pair
    return [comm.Irecv(arriving, source, Tag.CLOCK), comm.Isend(leaving, dest, Tag.CLOCK)]


def eager_limit(comm: Communicator) -> int:
    """Return how many bytes, a power of two, no longer leave before their receive is posted; 0 on one rank."""
    if comm.Get_size() == 1:
        return 0
    rank, limit = int(comm.Get_rank()), 0
    for exponent in range(6, 23):
        comm.Barrier()
        left = False
        if rank == 0:
            request = comm.Isend(np.ones(1 << exponent, np.uint8), 1, Tag.CLOCK)
            deadline = time.perf_counter() + 0.02
            while not left and time.perf_counter() < deadline:
                left = Testall([request])
        comm.Barrier()
        if rank == 1:
            Waitall([comm.Irecv(np.empty(1 << exponent, np.uint8), 0, Tag.CLOCK)])
        if rank == 0 and not left:
            Waitall([request])
        if not comm.allgather(left)[0]:
            return 1 << exponent
        limit = 2 << exponent
    return limit
