"""Time Mesh-Attention where messages and blocks take equally long, beside what its schedule predicts.

    sudo run/netns.sh --hosts 4 --rate 50mbit .venv/bin/python benchmarks/network/equal.py --json equal-4.json

In each round one hop of each kind is timed, and one block, each on all ranks at once; the schedule predicts
from these the time of a pass; then the pass is timed. Real blocks need a core for each rank. With `--device` a
block is a wait of the same length in which the core is free, as when a device computes, so that any number of
hosts fits on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiattn import MeshAttention
from mpiattn.commands.env.environment import environment
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.messages.parcel import Parcel
from mpiattn.schedule.steps import HopTimes, Op, makespan

HOPS = 3  # timed together: the ranks leave a barrier one after the other


class Device:
    """A kernel that takes a while and computes nothing; it lets messages progress, and leaves the core free."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def forward(self, *arguments: Any) -> None:
        """Wait; the last argument is `progress`."""
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            if callable(arguments[-1]):
                arguments[-1]()
            time.sleep(0.0005)

    backward = forward


class Benchmark:
    """One problem on all ranks."""

    def __init__(self, comm: MPI.Intracomm, tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
        self.comm = comm
        self.side = round(comm.Get_size() ** 0.5)
        self.attention = MeshAttention(comm, rows=self.side, cols=self.side)
        rng = np.random.default_rng(comm.Get_rank())
        self.q, self.k, self.v, self.d_out = (
            rng.standard_normal((1, count, tokens, head_dim), np.float32)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        self.attention.kernel = Device(0)
        self.saved: Any = None
        self.run(False)
        self.run(True)

    def timed(self, work: Any) -> float:
        """Return the slowest rank's seconds."""
        self.comm.Barrier()
        start = time.perf_counter()
        work()
        return self.comm.allreduce(time.perf_counter() - start, MPI.MAX)

    def run(self, backward: bool) -> None:
        """Run one pass."""
        if backward:
            self.attention.backward(self.d_out, self.saved)
        else:
            _, self.saved = self.attention.forward(self.q, self.k, self.v)

    def hop(self, op: Op, backward: bool) -> float:
        """Return the seconds of one hop of a kind."""
        problem, attention = self.attention.problem, self.attention
        parcels = {
            Op.Q: problem.q_backward if backward else problem.q,
            Op.KV: problem.kv, Op.O: problem.o, Op.DQ: problem.d_q, Op.DKV: problem.d_kv,
        }  # fmt: skip
        leaving, arriving = (Parcel(parcels[op](0)) for _ in range(2))
        leaving.buffer.fill(0)
        ring = attention.col if op in (Op.KV, Op.DKV) else attention.row
        source, dest = ring.Shift(0, 1)

        def hops() -> None:
            for _ in range(HOPS):
                MPI.Request.Waitall([ring.Irecv(arriving.buffer, source), ring.Isend(leaving.buffer, dest)])

        return self.timed(hops) / HOPS

    def block(self, backward: bool) -> float:
        """Return the seconds of one block."""
        problem, rank = self.attention.problem, self.comm.Get_rank()
        where = problem.q_positions[rank], problem.kv_positions[rank]
        d_q, d_k, d_v = (np.zeros_like(array) for array in (self.q, self.k, self.v))
        lse = np.zeros(self.q.shape[:3], np.float32)
        kernel = self.attention.kernel
        if backward:
            rows = self.d_out, lse, lse
            return self.timed(lambda: kernel.backward(self.q, self.k, self.v, *rows, *where, d_q, d_k, d_v, None))
        return self.timed(lambda: kernel.forward(self.q, self.k, self.v, *where, d_q, lse, None))

    def costs(self, backward: bool) -> HopTimes:
        """Return the measured times of hops and a block."""
        kinds = {"q": Op.Q, "kv": Op.KV} | ({"dq": Op.DQ, "dkv": Op.DKV} if backward else {"o": Op.O})
        hops = {name: self.hop(op, backward) for name, op in kinds.items()}
        return HopTimes(block=self.block(backward), **hops)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="of each rank")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", default="", help="of the links, for the record")
    parser.add_argument("--device", action="store_true", help="blocks that wait instead of computing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    results = []
    for backward in (False, True):
        benchmark = Benchmark(comm, args.tokens, args.heads, args.kv_heads, args.head_dim)
        side, attention = benchmark.side, benchmark.attention
        communication = benchmark.costs(backward).communication(side, side)
        attention.kernel = Device(communication / side**2) if args.device else NumpyKernel(attention.mask)
        steps = attention.backward_steps if backward else attention.forward_steps
        rounds = []
        for number in range(args.rounds + 1):
            if backward:
                benchmark.run(False)
            costs = benchmark.costs(backward)
            seconds = benchmark.timed(partial(benchmark.run, backward))
            if number:
                rounds.append((costs, makespan(steps, costs), seconds))
        result = {
            "direction": "backward" if backward else "forward",
            "communication": statistics.median(c.communication(side, side) for c, _, _ in rounds),
            "compute": statistics.median(side**2 * c.block for c, _, _ in rounds),
            "predicted": statistics.median(p for _, p, _ in rounds),
            "measured": statistics.median(s for _, _, s in rounds),
            "ratio": statistics.median(s / p for _, p, s in rounds),
            "rounds": [{**vars(c), "predicted": p, "measured": s} for c, p, s in rounds],
        }
        results.append(result)
        attention.free()
    surroundings = environment(comm)
    if comm.Get_rank() > 0:
        return
    columns = ("communication", "compute", "predicted", "measured", "ratio")
    print(f"{'mesh':10}" + "".join(f"{name:>15}" for name in columns))
    for result in results:
        print(f"{result['direction']:10}" + "".join(f"{result[name]:15.3f}" for name in columns))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        document = {"ranks": comm.Get_size(), **settings, "results": results, "environment": surroundings}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


main()
