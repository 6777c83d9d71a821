"""Make the tables and figures of two documents, each beside what we get: where the two part, and why.

The documents are an article on Mesh-Attention (after arXiv 2512.20968) and a lab on Ring Attention. Each report is
a table, and a figure where there is one, in the folder --output: REPORT.md, .json and .png. The reports are

  complexity     volume, messages, communication to compute, memory: formulas and numbers
  speedup        speed-up on 4 to 256 devices
  communication  what a device receives and waits for, at 32K and 128K tokens
  training       training throughput of LLaMA-7B at 32K tokens, 4 to 64 devices
  weak           weak scaling with 8K tokens a device
  paper          the paper's 256 GPUs: less volume, and speed-up over network speeds
  samples        what is wrong in the documents' sample code, each shown by a number
  lab            standard against ring attention, measured: mpiexec -n 4 mpiattn documents lab
  all            every one but lab

All but lab run the algorithms themselves in virtual time, on a machine description (mpiattn/machines/), and need no
MPI and no GPU. Figures need matplotlib: pip install 'mpiattn[plot]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ... import machines
from ...errors import InputError
from ...machines import writing
from ...messages.message import Communicator
from ...planner.units import count
from .. import charts
from ..root import on_root, patiently
from . import communication, complexity, lab, paper, samples, speedup, training, weak
from .report import Report

REPORTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "complexity": complexity.make,
    "speedup": speedup.make,
    "communication": communication.make,
    "training": training.make,
    "weak": weak.make,
    "paper": paper.make,
    "samples": samples.make,
}

MACHINE, ROUNDS = "a100-ib", 5

UNUSED = {
    "lab": ("machine", "tokens"),
    "complexity": ("iterations", "tokens", "machine"),
    "communication": ("iterations", "tokens"),
    "samples": ("iterations", "tokens", "machine"),
}
"""Options that a report makes nothing of; of those that are not here, --iterations alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn documents`."""
    parser.add_argument("report", choices=[*REPORTS, "lab", "all"], metavar="REPORT", help="see above")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/documents"),
        metavar="FOLDER",
        help="made if need be (default %(default)s)",
    )
    names = ", ".join(machines.presets())
    parser.add_argument("--machine", metavar="NAME", help=f"what is simulated: {names}, or a file (default a100-ib)")
    parser.add_argument("--tokens", type=count, metavar="N", help="another length, such as 512K; of weak: a device's")
    parser.add_argument("--iterations", type=int, metavar="N", help="rounds of the lab (default 5)")


def main(args: argparse.Namespace, comm: Communicator | None = None) -> int:
    """Make one report, or all that need no MPI."""
    for option in UNUSED.get(args.report, ("iterations",)):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} does nothing for {args.report}: leave it out")
    args.machine = args.machine or MACHINE
    if comm is None:
        prepare(args)
    else:
        on_root(comm, lambda: prepare(args))
    if args.report == "lab":
        if comm is None or comm.Get_size() == 1:
            raise InputError("the lab is measured on several ranks: mpiexec -n 4 mpiattn documents lab")
        args.iterations = ROUNDS if args.iterations is None else args.iterations
        if args.iterations < 1:
            raise InputError(f"--iterations is at least 1, got {args.iterations}")
        args.called = f"mpiexec -n {comm.Get_size()} mpiattn documents lab"
        report = lab.measure(args, comm)
        patiently(comm, lambda: report.write() if report else None)
    elif comm is None or comm.Get_rank() == 0:
        for name in REPORTS if args.report == "all" else [args.report]:
            options = [f"--tokens {args.tokens}"] if args.tokens else []
            options += [f"--machine {args.machine}"] if args.machine != MACHINE else []
            args.called = " ".join(["mpiattn documents", name, *options])
            REPORTS[name](args).write()
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Make the folder, or raise InputError, before any work, where the files of the report can't be written there."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.output}: can't be made: {error.strerror or error}") from None
    writing.check(args.output / f"{args.report}.json")
    if args.report != "samples":
        charts.check(args.output / f"{args.report}.png")
