"""A rank of this host, watched from outside."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .ended import is_ending, process
from .record import State, Steps


@dataclass
class Watched:
    """A rank of this host.

    Attributes
    ----------
    handle : int, optional
        Of the process (Linux), readable at its end.
    started : int, optional
        When the process was, by the kernel's clock (Linux).
    well, ill : float
        The last time at which it certainly had neither begun to end nor raised an exception, and the first time at
        which it certainly had, of `time.monotonic`.
    gone : bool
        Its process has ended, or begun to.
    told : bool
        That it has ended without a word, which `Host.look` says once.
    stopped : float, optional
        Since when it is stopped, of `time.monotonic`.
    """

    rank: int
    pid: int
    steps: Steps
    stack: TextIO
    handle: int | None = None
    started: int | None = None
    well: float = -math.inf
    ill: float = math.inf
    gone: bool = False
    told: bool = False
    stopped: float | None = None
    count: int = -1
    seen: float = 0.0

    @classmethod
    def of(cls, folder: Path, rank: int, pid: int) -> Watched:
        """Return a rank whose files are in a folder."""
        stack = open(folder / f"{rank}.stack", "r+", errors="replace")  # noqa: SIM115 (as long as the rank is watched)
        # The handle first: while nobody holds it, another process could get the number.
        held, told = handle(pid), process(pid)
        return cls(rank, pid, Steps(folder / f"{rank}.steps"), stack, held, told and told.started)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to watch."""
        return self.steps.state == State.LEFT or (self.gone and self.steps.state in (State.RAISED, State.TOLD))

    @property
    def shown(self) -> bool:
        """Whether it has written where it is, or can't."""
        able = not self.stopping and self.steps.state == State.WATCHED and not self.ending
        return not able or os.fstat(self.stack.fileno()).st_size > 0

    @property
    def stopping(self) -> bool:
        """Whether its process is stopped."""
        told = process(self.pid)
        return told is not None and told.letter == "T"

    @property
    def ending(self) -> bool:
        """Whether its process has begun to end, or is over."""
        return is_ending(self.pid, self.started)

    def look(self) -> bool:
        """Look whether it is well; return whether this look is the first to see that it is not."""
        # A time from before what is seen well, and from after what is seen ill: the truth is between them.
        before, was_well = time.monotonic(), self.ill == math.inf
        self.gone = self.gone or self.ending
        state = self.steps.state  # after the process: it may say something, and end
        if self.gone or state in (State.RAISED, State.TOLD):
            self.ill = min(self.ill, time.monotonic())
        else:
            self.well = before
        return was_well and self.ill < math.inf

    def signal(self, number: int) -> None:
        """Send the process a signal, if it is still there."""
        with contextlib.suppress(OSError):
            if self.handle is not None:
                signal.pidfd_send_signal(self.handle, number)
            elif not self.gone:
                os.kill(self.pid, number)


def handle(pid: int) -> int | None:
    """Return a handle of a process, by which no other one can be meant; None where the system has none."""
    with contextlib.suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return None
