"""Time the ring that sends K/V against the one that reads them in place, by turns, on one host.

mpiexec -n 2 python benchmarks/overlap/shared.py --json shared-2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiattn import ALGORITHMS
from mpiattn.commands.env.environment import environment

HEADS, HEAD_DIM = 8, 128


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="64,256,1024", help="of each rank, several between commas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.Get_rank())
    rows: list[dict[str, Any]] = []
    for tokens in map(int, args.tokens.split(",")):
        q, k, v, d_out = rng.standard_normal((4, 1, HEADS, tokens, HEAD_DIM), np.float32)
        with ALGORITHMS["ring"](comm) as ring, ALGORITHMS["shared_ring"](comm) as shared:
            seconds: dict[str, list[list[float]]] = {"forward": [], "backward": []}
            for number in range(args.rounds + 1):
                pairs: dict[str, list[float]] = {"forward": [], "backward": []}
                for attention in (ring, shared) if number % 2 else (shared, ring):
                    saved: Any = None
                    for direction in pairs:
                        comm.Barrier()
                        start = time.perf_counter()
                        if saved is None:
                            _, saved = attention.forward(q, k, v)
                        else:
                            attention.backward(d_out, saved)
                        pairs[direction].append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
                if number:
                    for direction, pair in pairs.items():
                        seconds[direction].append(pair if number % 2 else pair[::-1])
        for direction, rounds in seconds.items():
            rows.append(
                {
                    "tokens": tokens,
                    "direction": direction,
                    "ring": statistics.median(a for a, _ in rounds),
                    "shared_ring": statistics.median(b for _, b in rounds),
                    "speedup": statistics.median(a / b for a, b in rounds),
                    "rounds": rounds,
                }
            )
    surroundings = environment(comm)
    if comm.Get_rank() > 0:
        return
    print(f"{comm.Get_size()} ranks, {HEADS} heads of {HEAD_DIM}, float32; {surroundings['mpi']}")
    print(f"{'tokens a rank':>14}{'':10}{'ring ms':>10}{'shared ms':>11}{'speed-up':>10}")
    for row in rows:
        times = f"{1e3 * row['ring']:10.2f}{1e3 * row['shared_ring']:11.2f}{row['speedup']:10.2f}"
        print(f"{row['tokens']:14} {row['direction']:9}{times}")
    if args.json:
        document = {"ranks": comm.Get_size(), "heads": HEADS, "head_dim": HEAD_DIM, "results": rows}
        args.json.write_text(json.dumps(document | {"environment": surroundings}, indent=1) + "\n")


main()
