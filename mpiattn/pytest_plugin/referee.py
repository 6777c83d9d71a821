"""Meetings of all ranks, in which each learns how a test went on every other.

A rank whose test failed before a collective call leaves the others waiting in it, and the next test
meets its stray messages. So the ranks meet after each phase of a test (set-up, call, tear-down), and
a rank that doesn't come ends the job with the traceback of where it is. Hence no test can hang.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import tempfile
import time
from enum import IntEnum
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..messages.ending import end_job

if TYPE_CHECKING:
    from mpi4py import MPI

SOON = 0.005  # seconds for the other ranks to come to a meeting
PATIENCE = 5.0  # seconds for a rank that is stuck to write its traceback
TEXT_LIMIT = 6000  # bytes of a rank's error message: its end, where the error is


class Outcome(IntEnum):
    """How a phase of a test went on one rank."""

    PASSED = 0
    SKIPPED = 1
    FAILED = 2


class Referee:
    """Meets with the referees of all ranks of `world`; waits for them `deadline` seconds, no longer."""

    def __init__(self, world: MPI.Intracomm, deadline: float) -> None:
        from mpi4py import MPI

        self.world = world
        self.comm = world.Dup()  # so that no message of a test is ever taken for one of the harness
        self.rank, self.size = world.rank, world.size
        self.deadline = deadline
        self.test_some = MPI.Request.Testsome
        # pytest captures file descriptor 2 while tests run; this is the terminal.
        self.stderr = os.dup(2)
        # A signal handler in C is the one thing that is sure to run in a rank that is stuck inside MPI.
        self.dump = tempfile.NamedTemporaryFile(prefix="mpiattn-", suffix=".traceback")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, file=self.dump, all_threads=True)
        self.processes = self.comm.allgather((socket.gethostname(), os.getpid(), Path(self.dump.name)))

    def meet(self, where: str, outcome: Outcome, text: str = "") -> list[tuple[Outcome, str]]:
        """Return the outcome and message of every rank; end the job if one of them doesn't come."""
        mine = bytes([outcome]) + text.encode()[-TEXT_LIMIT:]
        buffers = [bytearray(1 + TEXT_LIMIT) for _ in range(self.size)]
        # Not Iallgather: it would tell that some rank is missing, but not which.
        receives = [self.comm.Irecv(buffer, source) for source, buffer in enumerate(buffers)]
        sends = [self.comm.Isend(mine, dest) for dest in range(self.size)]
        missing = set(range(self.size))
        begun = time.monotonic()
        while True:
            missing.difference_update(self.test_some(receives) or ())
            if not missing:
                break
            waited = time.monotonic() - begun
            if waited > self.deadline:
                present = {rank: bytes(buffers[rank]) for rank in range(self.size) if rank not in missing}
                self.end_job(where, present)
            # Leaves the core to the ranks that still work. Most are here at once: a sleep for each of the thousands of
            # phases of a test run was half of its time.
            time.sleep(0.0005) if waited > SOON else os.sched_yield()
        for request in sends:
            request.Wait()
        return [(Outcome(b[0]), b[1:].rstrip(b"\0").decode(errors="replace")) for b in buffers]

    def end_job(self, where: str, present: dict[int, bytes]) -> NoReturn:
        """Say which ranks are missing and where they are; abort."""
        if self.rank != min(present):
            time.sleep(5)  # one rank speaks for all; this one only if that one can't
        missing = sorted(set(range(self.size)) - set(present))
        waited = f"within {self.deadline:g} s after rank {self.rank}"
        self.say(f"\n{where}: {ranks(missing)} did not finish {waited}")
        for rank, record in sorted(present.items()):
            if record[0] == Outcome.FAILED:
                self.say(f"--- rank {rank} failed:\n{record[1:].rstrip(bytes(1)).decode(errors='replace')}")
        for rank in missing:
            host, pid, dump = self.processes[rank]
            if host == socket.gethostname():
                os.kill(pid, signal.SIGUSR1)
                self.say(f"--- rank {rank} is here:\n{frames_of_test(written(dump))}")
            else:
                self.say(f"--- rank {rank} is process {pid} on {host}")
        for host, _, dump in self.processes:
            if host == socket.gethostname():
                dump.unlink(missing_ok=True)
        end_job(self.world, "", file=self.stderr)

    def timed_out(self, where: str, seconds: float) -> NoReturn:
        """End a test in which every rank is stuck; runs in a thread of its own."""
        faulthandler.dump_traceback(self.dump, all_threads=True)
        frames = frames_of_test(Path(self.dump.name).read_text())
        self.say(f"\n{where}: rank {self.rank} still runs after {seconds:g} s, here:\n{frames}")
        self.dump.close()
        time.sleep(2)  # the other ranks have a traceback to show too
        os._exit(1)  # not Abort: a second thread may not call MPI while the first is stuck in it

    def say(self, text: str) -> None:
        """Write to the terminal past pytest's capture."""
        os.write(self.stderr, f"{text}\n".encode())

    def close(self) -> None:
        """Free the communicator of the referees."""
        faulthandler.unregister(signal.SIGUSR1)
        self.dump.close()
        self.comm.Free()


def written(dump: Path) -> str:
    """Return the traceback that another process is writing, once it is whole."""
    text, end = "", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.3)
        before, text = text, dump.read_text()
        if text == before != "":
            break
    return text


def frames_of_test(dump: str) -> str:
    """Return what a dump of faulthandler says of the test: the frames above pytest's own."""
    for thread in dump.split("\n\n"):
        head, *frames = thread.splitlines()
        own = list(takewhile(lambda frame: "/_pytest/" not in frame, frames))
        if 0 < len(own) < len(frames):
            return "\n".join([head, *own])
    return dump


def ranks(numbers: list[int]) -> str:
    """Return "rank 2" or "ranks 0, 2"."""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
