"""The command line: `mpiexec -n N mpiattn COMMAND`, parsed on rank 0, so that help and errors appear once."""

from __future__ import annotations

import argparse
import ctypes.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from threadpoolctl import threadpool_limits

from .. import __version__, machines, virtual
from ..errors import InputError, WriteError
from ..messages.message import Communicator
from . import chosen, ending, run, signals, terminal, watching
from .bench import command as bench
from .calibrate import command as calibrate
from .compare import command as compare
from .conformance import command as conformance
from .documents import command as documents
from .env import command as env
from .env.warnings import first_of_host, launcher_warnings
from .generate import command as generate
from .plan import command as planner
from .schedule import command as schedule
from .terminal import Help
from .trace import command as trace
from .train import command as train

USAGE_ERROR = 2

COMMANDS: dict[str, tuple[Any, bool | None, str]] = {
    "compare": (compare, True, "run algorithms side by side on the same input and check them"),
    "run": (run, True, "run one algorithm on a file and write the output to a file"),
    "generate": (generate, True, "let a real model answer, its cache spread over the ranks"),
    "train": (train, True, "train a small model on a text, its sequences spread over the ranks"),
    "conformance": (conformance, True, "check an implementation, yours too, against the oracle and the formulas"),
    "bench": (bench, True, "measure kernels and messages"),
    "env": (env, True, "show which MPI, BLAS, threads, host and cores each rank got"),
    "schedule": (schedule, False, "print the order of messages and blocks of a mesh tile"),
    "trace": (trace, False, "show what a file written with --trace recorded"),
    "calibrate": (calibrate, True, "measure this machine and write its description for plan"),
    "plan": (planner, False, "say which algorithm and grid suit a cluster, and why, in virtual time"),
    "documents": (documents, None, "make the tables and figures of the documents on Mesh- and Ring Attention"),
}
"""Module, whether it needs MPI (None: takes it where it is), and summary of each command."""

VIRTUAL = ("compare", "conformance")
"""Commands that also run on virtual ranks in one process."""

EPILOG = """\
examples:
  mpiexec -n 4 mpiattn compare                          every algorithm on real input, checked
  mpiexec -n 6 mpiattn compare --algorithms mesh --grid 2x3 --tokens 1001 --layout striped
  mpiexec -n 4 mpiattn run --algorithm ring --qkv in.npz --output out.npz
  mpiexec -n 4 mpiattn generate --model smollm2 --prompt "Why is the sky blue?"
  mpiattn schedule 4x4                                  the order of messages and blocks of a mesh tile
  mpiattn compare --virtual 16                          the same on 16 virtual ranks, without MPI
  mpiattn plan --tokens 1M --ranks 256 --machine h200-ib
  mpiexec -n 4 mpiattn compare --algorithms auto,ring   what the planner chooses here, and why, beside the ring
  mpiattn bench kernel                                  the NumPy kernel against its own matrix products
  mpiexec -n 4 mpiattn env                              what each rank really got

Exit status: 0 success, 1 a failure or a mismatch, 2 a wrong command line or wrong input.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="mpiattn",
        description="Exact distributed attention over MPI, forward and backward.",
        epilog=EPILOG,
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=f"mpiattn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, needs_mpi, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=Help)
        module.add_arguments(command)
        if needs_mpi is not False and module is not bench:  # whose benchmarks have it each
            watching.add_argument(command)
        if name in VIRTUAL:
            group = command.add_argument_group("without MPI")
            group.add_argument("--virtual", type=int, metavar="N", help="on N virtual ranks, in virtual time")
            names = ", ".join(machines.presets())
            group.add_argument("--machine", metavar="NAME", help=f"of one host (default laptop): {names}, or a file")
    return top


def world() -> Any:
    """Return MPI's COMM_WORLD, or None on a machine without an MPI library."""
    # MPICH has a line for every rank that ends the job; why is said in `ending`.
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD


def parse(argv: Sequence[str] | None, comm: Communicator | None) -> argparse.Namespace | int:
    """Return the options, or the exit status where there is nothing to do; rank 0 parses and prints."""
    result: argparse.Namespace | int | None = None
    if comm is None or comm.Get_rank() == 0:
        try:
            result = parser().parse_args(argv)
        except SystemExit as done:
            result = done.code if isinstance(done.code, int) else USAGE_ERROR
        sys.stdout.flush()
    return result if comm is None else comm.bcast(result)  # type: ignore[return-value]


def blas_threads(command: str) -> int | None:
    """Return 1 unless the user has decided otherwise: threads of several ranks on the same cores only get in the way.

    `env` shows what a program without this line gets.
    """
    return None if command == "env" or "OMP_NUM_THREADS" in os.environ else 1


def run_command(args: argparse.Namespace, comm: Communicator | None) -> int:
    """Run the command that was parsed; return the exit status."""
    module, needs_mpi, _ = COMMANDS[args.command]
    if args.command in VIRTUAL:
        chosen.check_machine(args)
    alone = needs_mpi is False or getattr(args, "virtual", None) is not None
    if alone and comm is not None and comm.Get_rank() > 0:
        return 0
    if alone:
        if needs_mpi is False:
            return int(module.main(args))
        args.machine = args.machine or "laptop"
        return virtual.command(module.main, args)
    if comm is None and needs_mpi:
        terminal.to_stderr("mpiattn: no MPI library found; one comes with: pip install 'mpiattn[mpich]'")
        if library := ctypes.util.find_library("mpich"):
            reason = f"mpi4py's wheel looks for Debian's {library} under the name libmpi.so.12: docs/launch.md says how"
            terminal.to_stderr(f"mpiattn: {reason} it finds it")
        return 1
    with threadpool_limits(blas_threads(args.command), "blas"), watching.watching(args, comm) as watched:
        return int(module.main(args, watched))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    terminal.ready()
    comm = world()
    first = comm is None or comm.Get_rank() == 0
    ending.wait_for_first_rank(first)
    if argv is None:  # this process is the command's
        signals.heed(comm)
    for sentence in launcher_warnings(os.environ, 1 if comm is None else comm.Get_size()):
        if first_of_host(os.environ):
            terminal.to_stderr(f"warning: {sentence}")
    try:
        args = parse(argv, comm)
        status = args if isinstance(args, int) else run_command(args, comm)
        sys.stdout.flush()
        return ending.leave(status, comm)
    except (InputError, WriteError) as error:  # the same on every rank
        if ending.first(comm):
            terminal.to_stderr(f"mpiattn: error: {error}")
        return ending.leave(USAGE_ERROR if isinstance(error, InputError) else 1, comm)
    except BaseException as error:
        ended = ending.status(error, comm)
        if ended is None:
            raise
        return ended
