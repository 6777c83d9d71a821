"""The ranks of this host, watched from outside: records, processes, stacks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .record import State, Steps
from .report import readable
from .state import Doing, read

DUMP = signal.SIGRTMIN + 9
"""The signal at which a rank writes its stack; not SIGUSR1, which schedulers send."""

CALM = 1.0  # seconds between two looks after which this process itself was stopped, and the ranks with it


SHOWN = 1.0  # seconds in which a rank shows where it is, on a machine that is busy


@dataclass
class Watched:
    """A rank of this host.

    Attributes
    ----------
    handle : int, optional
        Of the process (Linux), readable at its end.
    gone : bool
        Its process has ended.
    stopped : float, optional
        Since when it is stopped, of `time.monotonic`.
    """

    rank: int
    pid: int
    steps: Steps
    stack: TextIO
    handle: int | None = None
    gone: bool = False
    stopped: float | None = None
    count: int = -1
    seen: float = 0.0

    @classmethod
    def of(cls, folder: Path, rank: int, pid: int) -> Watched:
        """Return a rank whose files are in a folder."""
        stack = open(folder / f"{rank}.stack", "r+", errors="replace")  # noqa: SIM115 (as long as the rank is watched)
        return cls(rank, pid, Steps(folder / f"{rank}.steps"), stack, handle(pid))

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to watch."""
        return self.steps.state == State.LEFT or (self.gone and self.steps.state in (State.RAISED, State.TOLD))

    @property
    def shown(self) -> bool:
        """Whether it has written where it is, or can't."""
        able = not self.gone and self.steps.state == State.WATCHED and process_state(self.pid) != "T"
        return not able or os.fstat(self.stack.fileno()).st_size > 0

    def signal(self, number: int) -> None:
        """Send the process a signal, if it is still there."""
        with contextlib.suppress(OSError):
            if self.handle is not None:
                signal.pidfd_send_signal(self.handle, number)
            elif not self.gone:
                os.kill(self.pid, number)


class Host:
    """The ranks of this host.

    Parameters
    ----------
    name : str
    folder : path
        With RANK.steps and RANK.stack of each rank.
    ranks : list of (rank, pid)
    seconds : float
        Without a step, after which something is wrong.
    """

    def __init__(self, name: str, folder: Path, ranks: list[tuple[int, int]], seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.ranks = [Watched.of(folder, rank, pid) for rank, pid in ranks]
        shutil.rmtree(folder, ignore_errors=True)  # the files live as long as somebody has them open
        self.looked = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether there is nothing more to watch."""
        return all(watched.ended for watched in self.ranks)

    def ended(self, watched: Watched) -> str:
        """Note that the process of a rank has ended; return what is wrong with that."""
        watched.gone = True
        return f"rank {watched.rank} is gone" if watched.steps.state == State.WATCHED else ""

    def look(self) -> str:
        """Return what is wrong, nothing where nothing is."""
        now = time.monotonic()
        if now - self.looked > CALM:  # all of the job was suspended, by a scheduler or with Ctrl-Z
            for watched in self.ranks:
                watched.count = -1
        self.looked = now
        quiet = []
        for watched in self.ranks:
            if (count := watched.steps.count) != watched.count:
                watched.count, watched.seen, watched.stopped = count, now, None
            elif not watched.ended and now - watched.seen > self.seconds / 4:
                stopped = process_state(watched.pid) == "T"
                watched.stopped = (watched.stopped or watched.seen) if stopped else None
                quiet.append(watched)
        if all(watched.stopped for watched in self.ranks) and len(self.ranks) > 1:
            return ""  # suspended; this process was not
        if any(watched.stopped and now - watched.seen >= self.seconds for watched in quiet):
            return f"a rank has been stopped for {self.seconds:g} s"
        for watched in quiet:
            if now - watched.seen >= self.seconds and watched.steps.state == State.WATCHED:
                doing = self.doing(watched)
                if doing.waiting:
                    return f"no step for {self.seconds:g} s"
                if doing.passes:
                    return f"no step in {doing.passes[-1]} for {self.seconds:g} s"
        return ""

    def doing(self, watched: Watched) -> Doing:
        """Return what a rank does."""
        status = "gone" if watched.gone else "stopped" if process_state(watched.pid) == "T" else "running"
        doing = read(watched.steps, Doing(watched.rank, self.name, watched.pid, status), time.monotonic())
        watched.stack.seek(0)
        doing.stack = readable(watched.stack.read())
        return doing

    def stacks(self) -> None:
        """Have each rank write where it is; a handler in C does so, also in the middle of MPI."""
        for watched in self.ranks:
            watched.stack.truncate(0)
            if watched.steps.state == State.WATCHED:
                watched.signal(DUMP)
        end = time.monotonic() + SHOWN
        while time.monotonic() < end and not all(watched.shown for watched in self.ranks):
            time.sleep(0.05)

    def gather(self) -> list[Doing]:
        """Return what each rank does, and where it is."""
        self.stacks()
        return [self.doing(watched) for watched in self.ranks]

    def end(self) -> None:
        """End the ranks, whatever they are in: the launcher ends the job with a status other than 0."""
        for watched in self.ranks:
            if not watched.ended:
                watched.signal(signal.SIGKILL)


def process_state(pid: int) -> str:
    """Return the letter that Linux gives the state of a process: T is stopped; nothing where it can't be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def handle(pid: int) -> int | None:
    """Return a handle of a process, by which no other one can be meant; None where the system has none."""
    with contextlib.suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return None
