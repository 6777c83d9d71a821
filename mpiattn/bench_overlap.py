"""`mpiattn bench overlap`: how much of a message hides behind compute, and how long one waits afterwards."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from . import env
from .arrays import Parcel
from .kernels.numpy import NumpyKernel
from .mask import Full
from .message import Communicator, InputError, Tag, Testall, Waitall, constant

DESCRIPTION = """\
Measure one step of a ring on all ranks: a block of K/V leaves and one arrives, while the NumPy kernel
computes on a third. The columns are those of the OSU benchmarks of non-blocking collectives:

  overall        post the messages, compute, wait
  compute        the same compute, no messages; as many queries as make it RATIO times communication
  communication  the same messages, no compute
  overlap        how much of communication is hidden: 1 - (overall - compute) / communication
  wait           what is left to wait for after compute, also as a fraction of overall

progress says whether the kernel lets the MPI library move the messages between its tiles (`Testall`).
Times are the slowest rank's, medians over rounds in which all take turns; wait is also given for the ranks'
average, which contains less of the ranks' waiting for each other. On one host the cores that compute
also copy the messages, so that overlap cannot reach 100 %; over a network it can.
"""

HEADS, HEAD_DIM = 8, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench overlap`."""
    parser.add_argument("--mib", type=float, default=16, metavar="N", help="of K and V together (default 16 MiB)")
    parser.add_argument("--ratios", type=_numbers, default=[1, 2, 4], metavar="R,...", help="default 1,2,4")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default 15, after one that is not timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


class Step:
    """One step of a ring, to be measured in several ways."""

    def __init__(self, comm: Communicator, tokens: int) -> None:
        self.comm = comm
        size, rank = comm.Get_size(), comm.Get_rank()
        self.source, self.dest = (rank - 1) % size, (rank + 1) % size
        spec = ((1, HEADS, tokens, HEAD_DIM), np.dtype(np.float32))
        self.near, self.leaving, self.arriving = (Parcel([spec, spec]) for _ in range(3))
        rng = np.random.default_rng(rank)
        for array in self.near.arrays + self.leaving.arrays:
            array[...] = rng.standard_normal(array.shape, np.float32)
        self.arriving.fill(0, 0)
        self.keys = np.arange(tokens)
        self.kernel = NumpyKernel(Full())
        self.ask(1)

    def ask(self, queries: int) -> None:
        """Set the number of queries, and with it the time of compute."""
        self.q = np.random.default_rng(0).standard_normal((1, HEADS, queries, HEAD_DIM), np.float32)
        self.queries = np.arange(queries)

    def post(self) -> list[Any]:
        """Post the receive, then the send."""
        arriving = self.comm.Irecv(self.arriving.message, self.source, Tag.KV)
        return [arriving, self.comm.Isend(self.leaving.message, self.dest, Tag.KV)]

    def compute(self, progress: Any = None) -> None:
        """Attend to a block."""
        out, lse = np.zeros_like(self.q), np.full(self.q.shape[:3], -np.inf, np.float32)
        k, v = self.near.arrays
        self.kernel.forward(self.q, k, v, self.queries, self.keys, out, lse, progress)

    def time(self, communicates: bool, computes: bool, pokes: bool) -> tuple[float, float]:
        """Return the seconds of one step, and of its wait, on this rank."""
        self.comm.Barrier()
        start = time.perf_counter()
        requests = self.post() if communicates else []
        if computes:
            self.compute(partial(Testall, requests) if pokes else None)
        middle = time.perf_counter()
        Waitall(requests)
        end = time.perf_counter()
        return end - start, end - middle


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure and print; return the exit status."""
    if comm.Get_size() < 2:
        raise InputError("bench overlap measures messages: start it on two or more ranks, mpiexec -n 2 ...")
    if args.mib <= 0 or args.rounds < 1 or min(args.ratios) <= 0:
        raise InputError("--mib, --ratios and --rounds are above zero")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"{args.json.parent}: no such folder")
    environment = env.environment(comm)
    step = Step(comm, max(round(args.mib * 2**20 / (2 * HEADS * HEAD_DIM * 4)), 1))
    results = [row for ratio in args.ratios for row in measure(step, ratio, args.rounds)]
    if comm.Get_rank() == 0:
        print(f"{step.near.buffer.nbytes / 2**20:g} MiB blocks, {comm.Get_size()} ranks, {environment['mpi']}")
        columns = ("overall", "compute", "communication", "wait", "mean_wait")
        headers = ("ratio", "progress", "overall ms", "compute ms", "comm. ms", "wait ms", "mean wait ms")
        rows = []
        for result in results:
            times = [1e3 * result[name] for name in columns]
            shares = [f"{result['overlap']:.0%}", f"{result['wait_share']:.2%}", f"{result['mean_wait_share']:.2%}"]
            rows.append([result["ratio"], "Testall" if result["progress"] else "none", *times, *shares])
        print(tabulate(rows, headers=[*headers, "overlap", "wait", "mean wait"], floatfmt=("g", "", *[".2f"] * 5)))
        if args.json:
            command = " ".join(["mpiattn", *sys.argv[1:]])
            document = {
                "command": command,
                "environment": environment,
                "bytes": step.near.buffer.nbytes,
                "results": results,
            }
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def measure(step: Step, ratio: float, rounds: int) -> list[dict[str, Any]]:
    """Return a row without and one with progress, for compute that takes `ratio` times communication."""
    comm = step.comm
    ways = {
        "communication": (True, False, False),
        "compute": (False, True, False),
        "none": (True, True, False),
        "testall": (True, True, True),
    }
    communication = _slowest(comm, [step.time(*ways["communication"])[0] for _ in range(9)])
    step.ask(64)
    for _ in range(3):  # time isn't quite proportional to queries
        seconds = _slowest(comm, [step.time(*ways["compute"])[0] for _ in range(5)])
        step.ask(max(round(len(step.queries) * ratio * communication / seconds), 1))
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            overall, wait = step.time(*way)
            slowest = np.empty(2)
            comm.Allreduce(np.array([overall, wait]), slowest, constant("MAX"))
            mean = np.empty(1)
            comm.Allreduce(np.array([wait]), mean)
            if number:
                times[name].append((*map(float, slowest), float(mean[0]) / comm.Get_size()))
    medians = {name: [statistics.median(column) for column in zip(*times[name], strict=True)] for name in ways}
    rows = []
    for name in ("none", "testall"):
        overall, wait, mean_wait = medians[name]
        compute, communication = medians["compute"][0], medians["communication"][0]
        rows.append(
            {
                "ratio": ratio,
                "progress": name == "testall",
                "queries": len(step.queries),
                "overall": overall,
                "compute": compute,
                "communication": communication,
                "overlap": min(max(1 - (overall - compute) / communication, 0.0), 1.0),
                "wait": wait,
                "mean_wait": mean_wait,
                # Of the same step: what the machine does meanwhile is in both.
                "wait_share": statistics.median(w / o for o, w, _ in times[name]),
                "mean_wait_share": statistics.median(m / o for o, _, m in times[name]),
                "rounds": times[name],
            }
        )
    return rows


def _slowest(comm: Communicator, seconds: list[float]) -> float:
    """Return the median of the slowest rank's times."""
    slowest = np.empty(len(seconds))
    comm.Allreduce(np.array(seconds), slowest, constant("MAX"))
    return float(np.median(slowest))
