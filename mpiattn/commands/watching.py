"""--timeout: a command whose ranks are stuck says who waits for whom, and ends."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from ..errors import InputError
from ..messages.message import Communicator
from ..trace.watch.session import watch

BATCH = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "COBALT_JOBID", "PJM_JOBID")
"""Variables by which Slurm, PBS, LSF, Grid Engine, Cobalt and Fujitsu's system tell a batch job its number."""

BATCH_SECONDS = 600.0

FILE = "mpiattn-stuck.json"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --timeout."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="without a step, say which rank waits for which message from whom, write the last steps to "
        f"{FILE} for mpiattn trace, and end the job; 0 waits for ever (default in a batch job "
        f"{BATCH_SECONDS:g}, else 0)",
    )


def seconds(text: str) -> float:
    """Return a number of seconds, at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def watching(args: argparse.Namespace, comm: Communicator | None) -> contextlib.AbstractContextManager[Any]:
    """Return a block in which the ranks are watched, where they are to be and there are several.

    The block gives the communicator to use.
    """
    timeout = args.timeout
    if getattr(args, "elastic", False):
        if timeout:
            raise InputError("--timeout ends the job when a rank dies, and --elastic goes on: give one of them")
        timeout = 0.0
    if timeout is None:
        timeout = BATCH_SECONDS if any(name in os.environ for name in BATCH) else 0.0
    if comm is None or comm.Get_size() == 1:
        return contextlib.nullcontext(comm)
    timeout = comm.bcast(timeout)  # a launcher may pass an environment on to some hosts only
    return watch(comm, timeout, file=FILE) if timeout else contextlib.nullcontext(comm)
