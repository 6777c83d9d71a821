"""Measure the machine at hand, and write the description that the planner and the virtual cluster read.

Latency and bandwidth between two ranks of one host and of two hosts, with all ranks busy at once as in the
algorithms; how large a message may be that leaves before its receive is posted; the kernel's rate for several
sizes of a block, with all ranks computing at once; copies in memory, and what it takes to start one. On GPUs
messages are of device memory, or go through the host, as the algorithms' do; a block is called as often as fills some
milliseconds, and what it takes to queue a call and to post a message is measured apart. Run it as the algorithms will
run:

    mpiexec -n 4 mpiattn calibrate --output here.toml
    run/gpu.sh -n 4 mpiattn calibrate --arrays cupy --output here.toml
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

from . import env, gpu, grid, kernels, machines
from .arrays import Parcel, add, cast, take
from .arrays import dtype as dtype_of
from .device import Channel, DeviceComm
from .machine import Link, Machine, Rates
from .mask import Full
from .message import Communicator, InputError, Tag, Waitall, constant
from .problem import Problem
from .progress import bar
from .root import check_folders, on_root
from .softmax import accumulator

DEFAULTS = {
    "numpy": {"bytes": 2**20, "tokens": "32,128,512,2048", "heads": 8, "head_dim": 64, "dtypes": "float32"},
    "cupy": {"bytes": 2**26, "tokens": "1024,2048,4096,8192,16384,32768", "heads": 32, "head_dim": 128,
             "dtypes": "bfloat16"},
}  # fmt: skip

SMALL = 8
"""Bytes of the messages whose time is the latency."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn calibrate`."""
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the description, in TOML")
    parser.add_argument("--name", help="of the machine (default: the file's name)")
    parser.add_argument("--bytes", type=int, metavar="N", help="of the large messages (default 1 MiB, on GPUs 64 MiB)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="medians of so many (default 7)")
    parser.add_argument(
        "--tokens", metavar="N,...", help="block sizes for the kernel (default 32,128,512,2048, on GPUs 1024 to 32768)"
    )
    parser.add_argument("--heads", type=int, metavar="N", help="of the kernel's blocks (default 8, on GPUs 32)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="default 64, on GPUs 128")
    parser.add_argument("--dtypes", metavar="NAME,...", help="default float32, on GPUs bfloat16")
    gpu.add_arguments(parser)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and write the description on rank 0."""
    xp = gpu.namespace(args, comm)
    for name, value in DEFAULTS[xp.__name__].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.bytes, args.rounds, args.heads, args.head_dim) < 1:
        raise InputError("--bytes, --rounds, --heads and --head-dim must be 1 or more")
    try:
        sizes = sorted({int(size) for size in args.tokens.split(",")})
        dtypes = [dtype_of(name) for name in args.dtypes.split(",")]
    except ValueError as error:
        raise InputError(f"--tokens or --dtypes: {error}") from None
    on_root(comm, lambda: check_folders(args.output))
    progress = bar(comm, total=3 + len(dtypes) * len(sizes), unit="measurement")
    hosts = grid.hosts(comm)
    per_node = max(map(len, hosts))
    around = comm if xp is np else DeviceComm(comm, Channel(comm, xp, args.gpu_messages))
    links: dict[str, Link] = {}
    overhead = 0.0
    neighbours = {"node": beside(hosts, comm.Get_rank(), True), "network": beside(hosts, comm.Get_rank(), False)}
    for level, pair in neighbours.items():
        present = comm.allgather(pair)
        if any(pair is not None for pair in present):
            links[level] = measure_link(around, pair, args, xp)
            overhead = max(overhead, posting(around, pair, args, xp) if xp is not np else 0.0)
        progress.update()
    links.setdefault("network", links.get("node", Link(1e-6, 1e10)))
    if len(set(hosts)) > 1 and per_node > 1:  # all ranks of a host have sent at once: what one got is its share
        wire = links["network"]
        links["network"] = Link(wire.latency, wire.bandwidth * per_node, cards=1)
    bandwidth, launch = copies(comm, args, xp), launches(comm, dtypes[0], args, xp)
    progress.update()
    compute = {}
    for dtype in dtypes:
        forward, backward, calls = [], [], []
        for size in sizes:
            rates = kernel(comm, size, dtype, args, xp)
            forward.append(rates[0])
            backward.append(rates[1])
            calls.append(rates[2])
            progress.update()
        compute[dtype.name] = Rates(tuple(sizes), tuple(forward), tuple(backward), min(calls))
    progress.close()
    eager = eager_limit(comm) if xp is np else 0  # messages of device memory wait for their receive
    environment = env.environment(comm)
    if comm.Get_rank() == 0:
        source = f"mpiattn calibrate on {comm.Get_size()} ranks of {len(set(hosts))} hosts, {platform.platform()}"
        library = str((environment or {}).get("mpi", "")).splitlines()
        found = Machine(
            name=args.name or args.output.stem,
            source=f"{source}, {library[0] if library else 'MPI'}".replace('"', "'"),
            ranks_per_node=per_node,
            memory=memory() / per_node if xp is np else xp.cuda.Device().mem_info[1],
            memory_bandwidth=bandwidth,
            launch=launch,
            links=links,
            compute=compute,
            overhead=overhead,
            eager=eager,
        )
        machines.write(found, args.output)
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


def measure_link(comm: Communicator, pair: tuple[int, int] | None, args: argparse.Namespace, xp: Any) -> Link:
    """Return latency and bandwidth while every rank sends to the next one and receives from the one before."""
    times = {}
    for nbytes in (SMALL, args.bytes, 2 * args.bytes):
        seconds = []
        arriving, leaving = xp.empty(nbytes, np.uint8), xp.ones(nbytes, np.uint8)
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


def posting(comm: Communicator, pair: tuple[int, int] | None, args: argparse.Namespace, xp: Any) -> float:
    """Return the seconds that a rank spends to post a message."""
    seconds = []
    arriving, leaving = (xp.ones(args.bytes, np.uint8) for _ in range(2))
    for _ in range(args.rounds + 1):
        gpu.wait(xp)
        comm.Barrier()
        start = time.perf_counter()
        requests = []
        if pair is not None:
            requests = [comm.Irecv(arriving, pair[0], Tag.CLOCK), comm.Isend(leaving, pair[1], Tag.CLOCK)]
        seconds.append((time.perf_counter() - start) / 2)
        Waitall(requests)
    return float(max(comm.allgather(statistics.median(seconds[1:]))))


def copies(comm: Communicator, args: argparse.Namespace, xp: Any) -> float:
    """Return the bytes per second, read and written, of copies in memory, all ranks at once."""
    size = 2**23 if xp is np else 2**29
    source, target = xp.ones(size // 4, np.float32), xp.empty(size // 4, np.float32)
    return 2 * size / best(comm, args.rounds, lambda: xp.copyto(target, source), xp)


def launches(comm: Communicator, dtype: Any, args: argparse.Namespace, xp: Any) -> float:
    """Return the seconds that it takes to start a pass over arrays: the mean of a gather, a copy, a sum, a rounding."""
    shape = 1, 1, 8, args.head_dim
    part, total = cast(xp.ones(shape, np.float32), dtype), xp.ones(shape, accumulator(dtype))
    where, parcel = np.array([0, 1, 6, 7]), Parcel([(shape, dtype)], xp.empty(part.nbytes, np.uint8))

    def passes() -> None:
        for _ in range(SOME):
            take(part, where)
            parcel.pack(part)
            add(total, part)
            cast(total, dtype)

    return best(comm, args.rounds, passes, xp) / (4 * SOME)


def kernel(comm: Communicator, size: int, dtype: Any, args: argparse.Namespace, xp: Any) -> tuple[float, float, float]:
    """Return the operations per second of a block, forward and backward, all ranks at once.

    And the seconds that a rank spends to queue a call, before the device can start; 0 without a GPU.
    """
    shape = 1, args.heads, size, args.head_dim
    if xp is np:
        q, k, v, d_out = np.random.default_rng(0).standard_normal((4, *shape)).astype(dtype)
    else:
        q, k, v, d_out = (cast(xp.random.standard_normal(shape, dtype=np.float32), dtype) for _ in range(4))
    where, wide = np.arange(size), accumulator(dtype)
    problem = Problem(
        1, 1, args.heads, args.heads, args.head_dim, args.head_dim, size, size, dtype, "contiguous", Full()
    )
    block = kernels.choose(xp.__name__, problem, Full(), None, args.kernel)
    out, lse = xp.zeros(q.shape, wide), xp.full(q.shape[:3], -np.inf, wide)
    d_q, d_k, d_v = (xp.zeros(q.shape, wide) for _ in "qkv")

    def forward() -> None:
        if xp is not np:
            block.begin(out, lse)  # what follows waits there: adding it up is not part of the block's time
        block.forward(q, k, v, where, where, out, lse)

    def backward() -> None:
        if xp is not np:
            for total in (d_q, d_k, d_v):
                block.begin(total)
        block.backward(q, k, v, d_out, final, row_delta, where, where, d_q, d_k, d_v)

    work = args.heads * size**2 * args.head_dim
    seconds, queueing = best(comm, args.rounds, forward, xp), 0.0
    row_delta, final = xp.zeros(lse.shape, wide), lse if xp is np else xp.full(lse.shape, np.log(size), wide)
    rates = 4 * work / seconds, 10 * work / best(comm, args.rounds, backward, xp)
    if xp is not np:
        gpu.wait(xp)
        start = time.perf_counter()
        for _ in range(QUEUED):
            forward()
            backward()
        queueing = max(comm.allgather((time.perf_counter() - start) / (2 * QUEUED)))
        gpu.wait(xp)
    return *rates, queueing


QUEUED = 10
"""Calls that a GPU has certainly room for in its queue."""

SOME = 25
"""Times that passes are started one after the other."""

ENOUGH = 0.01
"""Seconds that calls on a GPU fill: the first ones wait for nothing, and the end of the last is waited for."""


def best(comm: Communicator, rounds: int, work: Callable[[], object], xp: Any = np) -> float:
    """Return the median over rounds, after one, of the time of the slowest rank."""
    seconds, calls = [], 1
    for number in range(rounds + 2):
        gpu.wait(xp)
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        gpu.wait(xp)
        seconds.append((time.perf_counter() - start) / calls)
        if xp is not np and number == 1:
            calls = comm.allreduce(int(ENOUGH / seconds[-1]) + 1, constant("MAX"))
    everyone: list[list[float]] = comm.allgather(seconds[2:])
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
