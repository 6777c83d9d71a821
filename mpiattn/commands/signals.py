"""SIGTERM and SIGUSR1, by which schedulers say that a job's time is over: what was printed so far is not lost.

A rank may be inside of MPI for ever, where no handler of Python's runs. So the signal wakes a thread.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time

from ..machines import writing
from ..messages import observer
from ..messages.message import Communicator
from . import terminal

HEEDED = (signal.SIGTERM, signal.SIGUSR1)

HEAD_START = 0.5  # seconds in which rank 0 says it, before another rank ends the job
FLUSH = 2.0  # seconds for standard output to take what is printed

AGAIN = {"SLURM_JOB_ID": "scontrol requeue", "PBS_JOBID": "qrerun", "LSB_JOBID": "brequeue"}
"""Command that puts a batch job into its queue again, by the variable that has its number."""


def heed(comm: Communicator) -> None:
    """Let these signals end this process with a line that says how to run the command again, and status 128 + number.

    A command that has a handler of its own for one of them does what it likes.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    here, there = socket.socketpair()
    there.setblocking(False)
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    for number in HEEDED:
        signal.signal(number, nothing)
    arguments = here, there, comm is None or comm.Get_rank() == 0, 1 if comm is None else comm.Get_size()
    threading.Thread(target=listen, args=arguments, daemon=True).start()


def nothing(*_: object) -> None:
    """Do nothing: the thread that is woken does it."""


def listen(here: socket.socket, _: socket.socket, first: bool, ranks: int) -> None:
    """Wait for one of the signals, and end."""
    begun = time.monotonic()
    while data := here.recv(1):
        number = data[0]
        if number in HEEDED and signal.getsignal(number) is nothing:
            end(number, first, ranks, time.monotonic() - begun)


def end(number: int, first: bool, ranks: int, seconds: float) -> None:
    """Flush what was printed, say how to run the command again, and end this process."""
    status = 128 + number
    late = threading.Timer(FLUSH, os._exit, [status])  # the reader may be gone
    late.daemon = True
    late.start()
    if observer.observer is not None:
        observer.observer.leave()
    for part in list(writing.UNDER_WAY):
        with contextlib.suppress(OSError):
            part.unlink()
    if first:
        sys.stdout.flush()
        name = signal.Signals(number).name
        terminal.to_stderr(f"mpiattn: ended by {name} after {seconds:.0f} s; again: {again(ranks)}")
    else:
        time.sleep(HEAD_START)
    os._exit(status)


def again(ranks: int) -> str:
    """Return the command that runs the same again."""
    for variable, command in AGAIN.items():
        if number := os.environ.get(variable):
            return f"{command} {number}"
    return (f"mpiexec -n {ranks} " if ranks > 1 else "") + shlex.join(["mpiattn", *sys.argv[1:]])
