"""What tracing costs: passes with and without it by turns, and the cost of one event.

mpiexec -n 2 python benchmarks/trace/overhead.py --json overhead-2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiattn import ALGORITHMS
from mpiattn.commands.env.environment import environment
from mpiattn.messages.message import Tag, Testall, Waitall
from mpiattn.trace.comm import TracedComm
from mpiattn.trace.events import Trace
from mpiattn.trace.kernel import TracedKernel

REPEATS = 2000


class Nothing:
    """A kernel that does nothing."""

    name = "nothing"

    def forward(self, *arrays: Any, **rest: Any) -> None:
        """Do nothing."""

    drop = remember = begin = settle = complete = forward


def per_event() -> dict[str, float]:
    """Return the microseconds that tracing adds to a block, to a message with its wait, and to a test."""
    where = np.arange(4)
    record = Trace()
    kernel: Any = Nothing()
    traced_kernel = TracedKernel(kernel, record)
    comm, traced = MPI.COMM_SELF, TracedComm(MPI.COMM_SELF, record)
    near, far = np.zeros((2, 8), np.uint8)

    def message(comm: Any) -> None:
        Waitall([comm.Irecv(far, 0, Tag.Q), comm.Isend(near, 0, Tag.Q)])

    def seconds(work: Any) -> float:
        record.clear()
        start = time.perf_counter()
        for _ in range(REPEATS):
            work()
        return time.perf_counter() - start

    def added(plain: Any, recorded: Any) -> float:
        pairs = [(seconds(plain), seconds(recorded)) for _ in range(9)]
        return 1e6 * statistics.median(b - a for a, b in pairs) / REPEATS

    block = SimpleNamespace(queries=where, keys=where)
    requests = [comm.Irecv(far, 0, Tag.Q), comm.Isend(near, 0, Tag.Q)]
    traced_requests = [traced.Irecv(far, 0, Tag.Q), traced.Isend(near, 0, Tag.Q)]
    result = {
        "block": added(*(partial(one.forward, None, None, None, block=block) for one in (kernel, traced_kernel))),
        "send, receive and wait": added(partial(message, comm), partial(message, traced)),
        "test": added(partial(Testall, requests), partial(Testall, traced_requests)),
    }
    Waitall(requests)
    Waitall(traced_requests)
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.Get_rank())
    q, k, v, d_out = rng.standard_normal((4, 1, 4, args.tokens, 64), np.float32)
    rows = []
    for name in ("ring", "mesh"):
        record = Trace()
        with ALGORITHMS[name](comm) as off, ALGORITHMS[name](TracedComm(comm, record)) as on:
            seconds: dict[str, list[float]] = {"off": [], "again": [], "on": []}
            ways = [("off", off), ("on", on), ("again", off)]
            for number in range(args.rounds + 1):
                for way, attention in ways[number % 3 :] + ways[: number % 3]:
                    record.clear()
                    comm.Barrier()
                    start = time.perf_counter()
                    _, saved = attention.forward(q, k, v)
                    attention.backward(d_out, saved)
                    slowest = comm.allreduce(time.perf_counter() - start, MPI.MAX)
                    if number:
                        seconds[way].append(slowest)
                    if way == "on":
                        events = len(record.events)
        pairs = list(zip(seconds["off"], seconds["again"], seconds["on"], strict=True))
        rows.append(
            {
                "algorithm": name,
                "events": events,
                "milliseconds": 1e3 * statistics.median(seconds["off"]),
                "on": statistics.median(n / (0.5 * (a + b)) for a, b, n in pairs),
                "off": statistics.median(a / b for a, b, _ in pairs),
            }
        )
    costs = per_event()
    surroundings = environment(comm)
    if comm.Get_rank() > 0:
        return
    print("tracing adds, in microseconds: " + ", ".join(f"{cost:.1f} to a {name}" for name, cost in costs.items()))
    print(
        f"{'':8}{'events':>8}{'ms':>9}{'on / off':>10}{'off / off':>11}   forward and backward, {comm.Get_size()} ranks"
    )
    for row in rows:
        print("{algorithm:8}{events:8}{milliseconds:9.2f}{on:10.4f}{off:11.4f}".format(**row))
    if args.json:
        document = {"ranks": comm.Get_size(), "tokens": args.tokens, "rounds": args.rounds}
        document |= {"microseconds": costs, "results": rows, "environment": surroundings}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


main()
