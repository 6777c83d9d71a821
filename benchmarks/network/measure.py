"""Time the algorithms over a slow network, by turns, and put the times beside the bytes.

    sudo run/netns.sh --hosts 4 --rate 100mbit .venv/bin/python benchmarks/network/measure.py --json 4-mha.json

Each rank sees few tokens with many numbers each, so that messages take most of the time, as on a cluster
whose compute is much faster than its network. A time is the slowest rank's; medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import mpiattn
from mpiattn.commands.env.environment import environment
from mpiattn.problems.grid import grids
from mpiattn.trace.comm import TracedComm

PASSES = ("forward", "backward")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="ring,mesh,ulysses,allgather", help="ring, and what to compare with it")
    parser.add_argument("--tokens", type=int, default=32, help="of each rank")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", default="", help="of the links, for the record")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.Get_rank())

    def normal(heads: int) -> Any:
        return rng.standard_normal((1, heads, args.tokens, args.head_dim), np.float32)

    q, k, v, d_out = normal(args.heads), normal(args.kv_heads), normal(args.kv_heads), normal(args.heads)

    cases: dict[str, Any] = {}
    for name in args.algorithms.split(","):
        for grid in grids(comm.Get_size()) if name == "mesh" else [None]:
            if grid and 1 in grid:  # the ring, or its like for queries
                continue
            arguments = {"rows": grid[0], "cols": grid[1]} if grid else {}
            cases[f"mesh {grid[0]}x{grid[1]}" if grid else name] = (mpiattn.ALGORITHMS[name], arguments)

    results: dict[str, Any] = {}
    first: list[Any] = []
    built: dict[str, Any] = {}
    for name, (algorithm, arguments) in cases.items():
        traced = TracedComm(comm)
        received = {}
        with algorithm(traced, **arguments) as attention:
            out, saved = attention.forward(q, k, v)
            received["forward"] = traced.trace.received()
            traced.trace.clear()
            values = [out, *attention.backward(d_out, saved)]
            received["backward"] = traced.trace.received()
        first = first or values
        error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(values, first, strict=True))
        results[name] = {"difference": comm.allreduce(error, MPI.MAX)}
        for direction in PASSES:
            messages, nbytes = received[direction]
            results[name][direction] = {
                "bytes": comm.allreduce(nbytes, MPI.MAX),
                "messages": comm.allreduce(messages, MPI.MAX),
                "seconds": [],
            }
        built[name] = algorithm(comm, **arguments)
    for _, (name, attention) in itertools.product(range(args.rounds), built.items()):
        saved = None
        for direction in PASSES:
            comm.Barrier()
            start = time.perf_counter()
            if direction == "forward":
                _, saved = attention.forward(q, k, v)
            else:
                attention.backward(d_out, saved)
            seconds = comm.allreduce(time.perf_counter() - start, MPI.MAX)
            results[name][direction]["seconds"].append(seconds)
    for attention in built.values():
        attention.free()

    surroundings = environment(comm)
    if comm.Get_rank() > 0:
        return
    print(f"{'':14}{'':10}{'seconds':>9}{'MB':>8}{'Mbit/s':>8}{'speed-up':>10}{'by bytes':>10}{'difference':>12}")
    for direction, (name, result) in itertools.product(PASSES, results.items()):
        one, ring = result[direction], results["ring"][direction]
        seconds = statistics.median(one["seconds"])
        # Ratios of the same round: what the machine does meanwhile is in both.
        one["speedup"] = statistics.median(r / s for r, s in zip(ring["seconds"], one["seconds"], strict=True))
        one["speedup_by_bytes"] = ring["bytes"] / one["bytes"]
        print(
            f"{name:14}{direction:10}{seconds:9.3f}{one['bytes'] / 1e6:8.2f}{one['bytes'] * 8e-6 / seconds:8.1f}"
            f"{one['speedup']:10.2f}{one['speedup_by_bytes']:10.2f}{result['difference']:12.1e}"
        )
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        document = {"ranks": comm.Get_size(), **settings, "results": results, "environment": surroundings}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


main()
