"""`mpiattn bench overlap`: how much of a message hides behind compute, and how long one waits afterwards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...machines import writing
from ...messages.message import Communicator
from .. import terminal
from ..env.environment import environment
from ..root import on_root
from .ring_step import HEAD_DIM, HEADS, RingStep, measure

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


EXAMPLES = """\
example:
  mpiexec -n 2 mpiattn bench overlap
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench overlap`."""
    parser.add_argument("--mib", type=float, default=16, metavar="N", help="of K and V together (default 16 MiB)")
    parser.add_argument("--ratios", type=_numbers, default=[1, 2, 4], metavar="R,...", help="default 1,2,4")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default 15, after one that is not timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure and print; return the exit status."""
    if comm.Get_size() < 2:
        raise InputError("bench overlap measures messages: start it on two or more ranks, mpiexec -n 2 ...")
    if args.mib <= 0 or args.rounds < 1 or min(args.ratios) <= 0:
        raise InputError("--mib, --ratios and --rounds are above zero")
    on_root(comm, lambda: writing.check(args.json))
    surroundings = environment(comm)
    step = RingStep(comm, max(round(args.mib * 2**20 / (2 * HEADS * HEAD_DIM * 4)), 1))
    results = [row for ratio in args.ratios for row in measure(step, ratio, args.rounds)]
    if comm.Get_rank() == 0:
        print(f"{step.near.buffer.nbytes / 2**20:g} MiB blocks, {comm.Get_size()} ranks, {surroundings['mpi']}")
        columns = ("overall", "compute", "communication", "wait", "mean_wait")
        headers = ("ratio", "progress", "overall ms", "compute ms", "comm. ms", "wait ms", "mean wait ms")
        rows = []
        for result in results:
            times = [1e3 * result[name] for name in columns]
            shares = [f"{result['overlap']:.0%}", f"{result['wait_share']:.2%}", f"{result['mean_wait_share']:.2%}"]
            rows.append([result["ratio"], "Testall" if result["progress"] else "none", *times, *shares])
        names = [*headers, "overlap", "wait", "mean wait"]
        print(terminal.table(rows, names, ["mean wait ms", "mean wait"], floatfmt=("g", "", *[".2f"] * 5, "", "", "")))
    if args.json:
        document: dict[str, Any] = {"command": " ".join(["mpiattn", *sys.argv[1:]]), "environment": surroundings}
        document |= {"bytes": step.near.buffer.nbytes, "results": results}
        on_root(comm, lambda: writing.write_json(args.json, document))
    return 0
