"""What the watch costs: microseconds of a step of a ring, and the share of a core that the process beside it takes.

usage: mpiexec -n 1 python benchmarks/faults/cost.py

A step posts a receive and a send, tests ten times for progress, as a kernel does, and waits. One rank sends to itself,
so that nothing but the calls themselves is measured; the fastest of many blocks of steps counts, with and without the
watch by turns, as the machine may do other things too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import mpiattn
from mpiattn.messages.message import Tag, Testall, Waitall

STEPS, BLOCKS, TESTS = 50, 2000, 10
STEP = 1e-3  # seconds


def steps(comm: Any, buffers: list[Any]) -> float:
    """Return the seconds of a step."""
    there, here = buffers
    begun = time.perf_counter()
    for _ in range(STEPS):
        requests = [comm.Irecv(here, 0, Tag.KV), comm.Isend(there, 0, Tag.KV)]
        for _ in range(TESTS):
            Testall(requests)
        Waitall(requests)
    return (time.perf_counter() - begun) / STEPS


def beside() -> float:
    """Return the seconds of CPU time that the watching processes of this user have taken."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"mpiattn.trace.watch.monitor" in (process / "cmdline").read_bytes():
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    comm = MPI.COMM_WORLD
    buffers = [np.zeros(8), np.zeros(8)]
    with mpiattn.watch(comm, seconds=60) as watched:
        best = {"plain": 1.0, "watched": 1.0}
        for _ in range(BLOCKS):
            best["plain"] = min(best["plain"], steps(comm, buffers))
            best["watched"] = min(best["watched"], steps(watched, buffers))
        taken, begun = beside(), time.monotonic()
        time.sleep(20)
        share = (beside() - taken) / (time.monotonic() - begun)
    more = best["watched"] - best["plain"]
    print(f"a step's calls without the watch  {1e6 * best['plain']:.2f} us")
    print(f"a step's calls with it            {1e6 * best['watched']:.2f} us")
    print(f"more                              {1e6 * more:.2f} us, {more / STEP:.2%} of a step of 1 ms")
    print(f"the process beside the ranks      {share:.2%} of a core")


if __name__ == "__main__":
    main()
