"""How fast messages between GPUs are: MPI's alone, and through mpiattn, of device memory and through the host.

    run/gpu.sh -n 2 python benchmarks/gpu/messages.py

Each rank sends to the next and receives from the one before, all at once; rates are of one direction.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpiattn import use_gpu
from mpiattn.messages.device.channel import Channel
from mpiattn.messages.device.comm import DeviceComm
from mpiattn.messages.message import Tag, Waitall

WORLD = MPI.COMM_WORLD
SIZES = 4, 64, 128, 512  # MiB


def slowest(exchange: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call, of the slowest rank."""
    exchange()
    exchange()
    WORLD.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        exchange()
    return max(WORLD.allgather((time.perf_counter() - start) / calls))


def main() -> None:
    """Measure, and print on rank 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xp = use_gpu(WORLD)
    source, dest = (WORLD.rank - 1) % WORLD.size, (WORLD.rank + 1) % WORLD.size
    ways = {way: DeviceComm(WORLD, Channel(WORLD, xp, way)) for way in ("device", "host")}
    name = xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    lines = [f"machine: {WORLD.size} ranks, {name}; {MPI.Get_library_version().split(',')[0]}", ""]
    for size in SIZES:
        sent = xp.arange(size * 2**18, dtype=np.uint32).view(np.uint8)
        got = xp.zeros_like(sent)
        xp.cuda.Device().synchronize()

        def raw(sent: object = sent, got: object = got) -> None:
            MPI.Request.Waitall([WORLD.Irecv(got, source), WORLD.Isend(sent, dest)])

        def through(comm: DeviceComm, sent: object = sent, got: object = got) -> None:
            Waitall([comm.Irecv(got, source, Tag.KV), comm.Isend(sent, dest, Tag.KV)])

        line = [f"{size:4} MiB"]
        kinds = [("MPI alone", raw)] if ways["device"].channel.on_device else []
        kinds += [(way, lambda comm=comm: through(comm)) for way, comm in ways.items()]
        for kind, exchange in kinds:
            seconds = slowest(exchange, 4 if kind == "host" else 10)
            line.append(f"{kind} {seconds * 1e6:6.0f} us {sent.nbytes / seconds / 1e9:5.1f} GB/s")
        assert bool((got == sent).all())
        lines.append("   ".join(line))
    there = xp.zeros(2**28, np.uint8)
    here = np.frombuffer(xp.cuda.alloc_pinned_memory(2**28), np.uint8, 2**28)
    copies = {"up": (there.data.ptr, here.ctypes.data), "down": (here.ctypes.data, there.data.ptr)}
    rates = [
        f"{name} {2**28 / slowest(lambda ends=ends: xp.cuda.runtime.memcpy(*ends, 2**28, 4), 4) / 1e9:.1f} GB/s"
        for name, ends in copies.items()
    ]
    lines.append(f"copies between pinned memory of the host and a GPU, all at once: {', '.join(rates)}")
    if WORLD.rank == 0:
        print("\n".join(lines))


main()
