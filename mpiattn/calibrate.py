"""Measure the machine at hand, and write the description that the planner and the virtual cluster read.

Latency and bandwidth between two ranks of one host and of two hosts, with all ranks busy at once as in the
algorithms; how large a message may be that leaves before its receive is posted; the kernel's rate for several
sizes of a block, with all ranks computing at once; copies in memory. Run it as the algorithms will run:

    mpiexec -n 4 mpiattn calibrate --output here.toml
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import env, machine
from .arrays import dtype as dtype_of
from .kernels.numpy import NumpyKernel
from .machine import Link, Machine, Rates
from .mask import Full
from .message import Communicator, InputError, Tag, Waitall, constant
from .progress import bar

SMALL = 8
"""Bytes of the messages whose time is the latency."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn calibrate`."""
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the description, in TOML")
    parser.add_argument("--name", help="of the machine (default: the file's name)")
    parser.add_argument("--bytes", type=int, default=2**20, metavar="N", help="of the large messages (default 1 MiB)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="medians of so many (default 7)")
    parser.add_argument("--tokens", default="32,128,512,2048", metavar="N,...", help="block sizes for the kernel")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="heads of the kernel's blocks (default 8)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--dtypes", default="float32", metavar="NAME,...", help="default float32")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and write the description on rank 0."""
    if min(args.bytes, args.rounds, args.heads, args.head_dim) < 1:
        raise InputError("--bytes, --rounds, --heads and --head-dim must be 1 or more")
    try:
        sizes = sorted({int(size) for size in args.tokens.split(",")})
        dtypes = [dtype_of(name) for name in args.dtypes.split(",")]
    except ValueError as error:
        raise InputError(f"--tokens or --dtypes: {error}") from None
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"{args.output.parent}: no such folder")
    progress = bar(comm, total=3 + len(dtypes) * len(sizes), unit="measurement")
    host = comm.Split_type(constant("COMM_TYPE_SHARED"))
    hosts = comm.allgather(tuple(host.allgather(comm.Get_rank())))
    per_node = max(map(len, hosts))
    links: dict[str, Link] = {}
    neighbours = {"node": beside(hosts, comm.Get_rank(), True), "network": beside(hosts, comm.Get_rank(), False)}
    for level, pair in neighbours.items():
        present = comm.allgather(pair)
        if any(pair is not None for pair in present):
            links[level] = measure_link(comm, pair, args)
        progress.update()
    links.setdefault("network", links.get("node", Link(1e-6, 1e10)))
    if len(set(hosts)) > 1 and per_node > 1:  # all ranks of a host have sent at once: what one got is its share
        wire = links["network"]
        links["network"] = Link(wire.latency, wire.bandwidth * per_node, cards=1)
    bandwidth = copies(comm, args)
    progress.update()
    compute = {}
    for dtype in dtypes:
        forward, backward = [], []
        for size in sizes:
            rates = kernel(comm, size, dtype, args)
            forward.append(rates[0])
            backward.append(rates[1])
            progress.update()
        compute[dtype.name] = Rates(tuple(sizes), tuple(forward), tuple(backward))
    progress.close()
    eager = eager_limit(comm)
    host.Free()
    environment = env.environment(comm)
    if comm.Get_rank() == 0:
        source = f"mpiattn calibrate on {comm.Get_size()} ranks of {len(set(hosts))} hosts, {platform.platform()}"
        library = str((environment or {}).get("mpi", "")).splitlines()
        found = Machine(
            name=args.name or args.output.stem,
            source=f"{source}, {library[0] if library else 'MPI'}".replace('"', "'"),
            ranks_per_node=per_node,
            memory=memory() / per_node,
            memory_bandwidth=bandwidth,
            links=links,
            compute=compute,
            eager=eager,
        )
        machine.write(found, args.output)
        print(args.output.read_text())
    return 0


def beside(hosts: list[tuple[int, ...]], rank: int, same: bool) -> tuple[int, int] | None:
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


def measure_link(comm: Communicator, pair: tuple[int, int] | None, args: argparse.Namespace) -> Link:
    """Return latency and bandwidth while every rank sends to the next one and receives from the one before."""
    times = {}
    for nbytes in (SMALL, args.bytes, 2 * args.bytes):
        seconds = []
        arriving, leaving = np.empty(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        repeat = 20 if nbytes == SMALL else 1
        for _ in range(args.rounds + 1):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeat if pair else 0):
                assert pair is not None
                Waitall([comm.Irecv(arriving, pair[0], Tag.CLOCK), comm.Isend(leaving, pair[1], Tag.CLOCK)])
            seconds.append((time.perf_counter() - start) / repeat)
        # Each rank waits for its neighbour: the slowest of a round says how long the exchange took.
        rounds = list(zip(*(mine for mine in comm.allgather(seconds[1:] if pair else None) if mine), strict=True))
        times[nbytes] = statistics.median(max(one) for one in rounds)
    slope = (times[2 * args.bytes] - times[args.bytes]) / args.bytes
    if slope <= 0:
        slope = times[args.bytes] / args.bytes
    return Link(times[SMALL], 1 / slope)


def copies(comm: Communicator, args: argparse.Namespace) -> float:
    """Return the bytes per second, read and written, of copies in memory, all ranks at once."""
    source, target = np.ones(2**23, np.uint8), np.empty(2**23, np.uint8)
    return 2 * source.nbytes / best(comm, args.rounds, lambda: np.copyto(target, source))


def kernel(comm: Communicator, size: int, dtype: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Return the operations per second of a block, forward and backward, all ranks at once."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.standard_normal((4, 1, args.heads, size, args.head_dim)).astype(dtype)
    where = np.arange(size)
    block, wide = NumpyKernel(Full()), np.float64 if dtype == np.float64 else np.float32
    out, lse = np.zeros(q.shape, wide), np.full(q.shape[:3], -np.inf, wide)
    d_q, d_k, d_v = (np.zeros(q.shape, wide) for _ in "qkv")
    forward = best(comm, args.rounds, lambda: block.forward(q, k, v, where, where, out, lse))
    row_delta = np.zeros(lse.shape, wide)
    backward = best(
        comm, args.rounds, lambda: block.backward(q, k, v, d_out, lse, row_delta, where, where, d_q, d_k, d_v)
    )
    work = args.heads * size**2 * args.head_dim
    return 4 * work / forward, 10 * work / backward


def best(comm: Communicator, rounds: int, work: Callable[[], object]) -> float:
    """Return the median over rounds, after one, of the time of the slowest rank."""
    seconds = []
    for _ in range(rounds + 1):
        comm.Barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    everyone: list[list[float]] = comm.allgather(seconds[1:])
    return float(statistics.median(max(one) for one in zip(*everyone, strict=True)))


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
                left = bool(request.Test())
        comm.Barrier()
        if rank == 1:
            comm.Irecv(np.empty(1 << exponent, np.uint8), 0, Tag.CLOCK).Wait()
        if rank == 0 and not left:
            request.Wait()
        if not comm.allgather(left)[0]:
            return 1 << exponent
        limit = 2 << exponent
    return limit


def memory() -> float:
    """Return the bytes of memory of this host."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemTotal"):
            return float(line.split()[1]) * 1024
    return 8e9
