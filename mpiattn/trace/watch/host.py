"""The ranks of this host, watched from outside: records, processes, stacks."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

from .alarm import Alarm, Kind
from .ended import gone, is_over, mark
from .record import State
from .report import readable
from .state import Doing, read
from .watched import Watched
from .wires import Wires, in_order

DUMP = signal.SIGRTMIN + 9
"""The signal at which a rank writes its stack; not SIGUSR1, which schedulers send."""

CALM = 1.0  # seconds between two looks after which this process itself was stopped, and the ranks with it
SHOWN = 1.0  # seconds in which a rank shows where it is, on a machine that is busy


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
        self.wires = Wires(folder, [rank for rank, _ in ranks])
        shutil.rmtree(folder, ignore_errors=True)  # the files live as long as somebody has them open
        self.looked = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether there is nothing more to watch."""
        return all(watched.ended for watched in self.ranks)

    @property
    def lost(self) -> list[Watched]:
        """Ranks that have ended without a word."""
        return [watched for watched in self.ranks if watched.gone and watched.steps.state == State.WATCHED]

    def see(self) -> None:
        """Look which ranks are well, and in which order the others have ended."""
        # Once more after one that is not well: who is well then was not the first.
        while sum(watched.look() for watched in self.ranks):
            pass
        self.order()

    def order(self) -> None:
        """Take in what the wires tell of the order in which ranks have ended."""
        ranks = {watched.rank: watched for watched in self.ranks}
        lost = {watched.rank: watched for watched in self.lost}
        # Who is over has hung up, or never will: a child of the process holds the wire. First who is over, then who
        # has hung up: so whoever is neither does so after the first one.
        over = {rank for rank, watched in lost.items() if is_over(watched.pid, watched.started)}
        self.wires.read()
        # A rank that has closed its wire, and goes on, has told nothing.
        self.wires.hung = [rank for rank in self.wires.hung if ranks[rank].gone or ranks[rank].ending]
        hung = [rank for rank in self.wires.hung if rank in lost]
        if not hung or len(lost) == 1 or not in_order():
            return
        earliest = lost[hung[0]]
        for rank in [*hung[1:], *(set(self.wires.open.values()) & lost.keys() - over)]:
            if lost[rank].ill > earliest.well:  # else it began to end before, for a reason of its own
                lost[rank].well = max(lost[rank].well, earliest.ill)
                lost[rank].ill = max(lost[rank].ill, earliest.ill)

    def look(self) -> Alarm | None:
        """Return what is wrong, None where nothing is."""
        self.see()
        if new := [watched for watched in self.lost if not watched.told]:
            for watched in new:
                watched.told = True
            return Alarm(Kind.GONE, gone([watched.rank for watched in new]))
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
                watched.stopped = (watched.stopped or watched.seen) if watched.stopping else None
                quiet.append(watched)
        if all(watched.stopped for watched in self.ranks) and len(self.ranks) > 1:
            return None  # suspended; this process was not
        if any(watched.stopped and now - watched.seen >= self.seconds for watched in quiet):
            return Alarm(Kind.STOPPED, f"a rank has been stopped for {self.seconds:g} s")
        for watched in quiet:
            if now - watched.seen >= self.seconds and watched.steps.state == State.WATCHED:
                doing = self.doing(watched)
                where = f" in {doing.passes[-1]}" if doing.passes and not doing.waiting else ""
                if doing.waiting or where:
                    return Alarm(Kind.QUIET, f"no step{where} for {self.seconds:g} s")
        return None

    def doing(self, watched: Watched) -> Doing:
        """Return what a rank does."""
        status = "gone" if watched.gone else "stopped" if watched.stopping else "running"
        doing = read(watched.steps, Doing(watched.rank, self.name, watched.pid, status), time.monotonic())
        doing.well, doing.ill = watched.well, watched.ill
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
        self.see()  # before the stacks, which take time: a launcher ends the other ranks in the meantime
        self.stacks()
        doings = {watched.rank: self.doing(watched) for watched in self.ranks}
        mark(doings)
        return list(doings.values())

    def end(self) -> None:
        """End the ranks, whatever they are in: the launcher ends the job with a status other than 0."""
        for watched in self.ranks:
            if not watched.ended:
                watched.signal(signal.SIGKILL)
