"""The process beside the ranks of a host that notices when they are stuck, and says why.

It runs in a session of its own, without MPI, so that it outlives ranks that a launcher kills. That of rank 0's host
gathers what those of the other hosts know, prints the report, and has them end their ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from ...errors import WriteError
from ...messages.ending import until_read
from .alarm import Alarm, Kind
from .ended import gone, mark
from .graph import stuck
from .host import Host
from .network import call
from .others import BEAT, PATIENCE, Others
from .report import report
from .state import Doing
from .watched import handle

LAUNCHERS = ("prterun", "prted", "mpiexec", "mpirun", "orted", "hydra_", "pmi_proxy")
"""Names of launchers and of their daemons: Open MPI's, MPICH's and Intel MPI's."""

LEAVING = 0.5  # seconds that a launcher has to end by itself


class Monitor:
    """Watches the ranks of this host, and speaks with the watches of the others.

    Parameters
    ----------
    settings : dict
        From `session`: name, folder, ranks and launcher of this host; table (host and process of every rank), seconds,
        file, hosts, secret; of rank 0's host the number of a listening socket, of another one addresses and port.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.seconds = settings, float(settings["seconds"])
        self.host = Host(settings["name"], Path(settings["folder"]), settings["ranks"], self.seconds)
        self.selector = DefaultSelector()
        for watched in self.host.ranks:
            if watched.handle is not None:
                self.selector.register(watched.handle, EVENT_READ, partial(self.woken, watched.handle))
        if self.host.wires.epoll:  # wakes it, no more; before a launcher has killed the others, with some luck
            self.selector.register(self.host.wires.epoll, EVENT_READ, lambda: None)
        self.others: Others | None = None
        self.above = None
        self.heard, self.again = time.monotonic(), 0.0
        self.told = False  # by rank 0's host to end the ranks
        if "listener" in settings:
            listener = socket.socket(fileno=settings["listener"])
            self.others = Others(self.selector, listener, settings["hosts"] - 1, settings["secret"], self.seconds)
        elif settings["hosts"] > 1:
            self.above = call(settings["addresses"], settings["port"])
            if self.above is None:
                say(f"mpiattn.watch: {self.host.name} does not reach rank 0's host, and is watched on its own\n")
            else:
                self.selector.register(self.above.socket, EVENT_READ, self.obey)
                numbers = [watched.rank for watched in self.host.ranks]
                self.above.send(secret=settings["secret"], name=self.host.name, ranks=numbers)

    def run(self) -> int:
        """Watch until all ranks have come to the end of the block; return the exit status."""
        while not self.done():
            wrongs = [key.data() for key, _ in self.selector.select(min(0.25, self.seconds / 10))]
            wrongs += [self.host.look(), self.others.beat() if self.others else self.miss()]
            if self.told:
                return 1
            if any(self.alarm(wrong) for wrong in wrongs if wrong):
                self.dismiss()
                return 1
        if self.above:
            self.above.send(bye=True)
        return 0

    def done(self) -> bool:
        """Say whether there is nothing more to watch, here and for rank 0's host anywhere."""
        return self.host.done and (self.others is None or self.others.done)

    def woken(self, ended: int) -> None:
        """Be woken by the end of a process: what that means is for `Host.look` to see, which follows."""
        self.selector.unregister(ended)

    def obey(self) -> Alarm | None:
        """Do what rank 0's host asks."""
        assert self.above is not None
        for line in self.above.lines():
            self.heard = time.monotonic()
            if line["ask"] == "clock":
                self.above.send(clock=time.monotonic())
            elif line["ask"] == "doing":
                asked = self.heard
                given = [doing.to_json() for doing in self.host.gather()]
                self.above.send(doing=given, sent=line["sent"], asked=asked, said=time.monotonic())
            else:
                self.told = True
                self.host.end()
        if self.above.lost and not self.told:
            self.selector.unregister(self.above.socket)
            return Alarm(Kind.SILENT, "rank 0's host has ended its watch")
        return None

    def miss(self) -> Alarm | None:
        """Return whether there is no word from rank 0's host, for longer than that would take to end the job itself."""
        if self.above and time.monotonic() - self.heard > self.seconds + 2 * BEAT + PATIENCE:
            self.above.lost = True
            return Alarm(Kind.SILENT, f"no word from rank 0's host for {self.seconds:g} s")
        return None

    def alarm(self, wrong: Alarm) -> bool:
        """Ask what all ranks do, and unless some still make steps, report it and end the job; return whether it did."""
        if self.above and not self.above.lost:
            self.above.send(wrong=wrong, gone=[watched.rank for watched in self.host.lost])
            return False
        certain = wrong.kind is not Kind.QUIET
        if not certain and time.monotonic() < self.again:
            return False
        self.again = time.monotonic() + max(self.seconds / 4, 0.5)
        ranks = self.gather()
        if not certain and not confirmed(ranks, self.seconds):
            return False
        lost = [rank for rank, doing in ranks.items() if doing.status == "gone"]
        ended = wrong.kind in (Kind.GONE, Kind.UNWATCHED)
        if not ended or not any(said(doing) for doing in ranks.values()):
            noticed = gone(lost) if lost and wrong.kind is Kind.GONE else wrong.text  # others may be gone by now
            text = report(ranks, noticed, self.settings["file"])
            say(text)
            keep(ranks, self.others.offsets if self.others else {}, text, self.settings["file"])
        # Else a rank has ended the job by an exception or at a signal, and has said so.
        if self.others:
            self.others.end()
        self.host.end()
        return True

    def dismiss(self) -> None:
        """End the launcher, as far as it is on this host, where it outlives its ranks: it waits for a lost host."""
        if self.settings["hosts"] == 1:
            return
        pids = above(self.settings["launcher"])
        if self.others is None:  # not the launcher of all, which hosts that are only namespaces see as well
            pids = [pid for pid in pids if namespace(pid) == namespace(os.getpid())]
        launchers = [each for each in map(handle, pids) if each is not None]
        until_read(2)
        time.sleep(LEAVING)
        for each in reversed(launchers):  # mpiexec itself first: its status counts
            with contextlib.suppress(OSError):  # it has ended, or is the system's, as Slurm's
                signal.pidfd_send_signal(each, signal.SIGKILL)

    def gather(self) -> dict[int, Doing]:
        """Return what each rank does, of hosts that answer."""
        table = self.settings["table"] if self.others else {}
        ranks = {rank: Doing(rank, host, pid) for rank, (host, pid) in enumerate(table)}
        for other in self.others.all if self.others else ():
            for rank in other.ranks if other.left else ():
                ranks[rank].status = "left"
        # The others first: the sooner they look, the more is certain of what came after what.
        asked = self.others.ask() if self.others else []
        for doing in [*self.host.gather(), *(self.others.gather(asked) if self.others else ())]:
            ranks[doing.rank] = doing
        mark(ranks)
        return ranks


def above(pid: int) -> list[int]:
    """Return the processes of a launcher from one on, each the child of the next one."""
    found = []
    with contextlib.suppress(OSError):
        while pid > 1:
            name, fields = Path(f"/proc/{pid}/comm").read_text().strip(), Path(f"/proc/{pid}/stat").read_text()
            if name.startswith("python"):  # a program that has started the launcher, maybe under another one
                break
            found += [pid] if name.startswith(LAUNCHERS) else []
            pid = int(fields.rpartition(")")[2].split()[1])
    return found


def namespace(pid: int) -> str:
    """Return the namespace of the host's name in which a process is."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/uts")
    return ""


def confirmed(ranks: dict[int, Doing], seconds: float) -> bool:
    """Say whether ranks wait, or compute, in a way that leads nowhere."""
    alone = [doing for doing in ranks.values() if doing.passes and not doing.waiting and doing.quiet >= seconds]
    return bool(stuck(ranks, seconds) or alone)


def said(doing: Doing) -> bool:
    """Say whether a rank has said why it ends: by a signal, or an exception that is not MPI's of another rank's end."""
    mpi = doing.error.startswith("mpi4py.MPI.Exception")
    return doing.status == "told" or (doing.status == "raised" and not mpi)


def keep(ranks: dict[int, Doing], offsets: dict[str, float], text: str, file: str) -> None:
    """Write the last steps of all ranks to a file, and the report with them."""
    # All that needs NumPy, which a monitor loads here only.
    from ...machines.writing import write_text
    from ..file import document
    from .timeline import traces

    whole = document(traces(ranks, offsets))
    whole["otherData"]["report"] = text
    try:
        write_text(file, json.dumps(whole) + "\n")
    except WriteError as error:
        say(f"mpiattn.watch: the last steps are lost: {error}\n")


def say(text: str) -> None:
    """Write to the terminal, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def main() -> int:
    """Watch by the settings on standard input."""
    settings = json.loads(sys.stdin.readline())
    if os.fork():  # an orphan: nobody has to wait for it, and a launcher does not know it
        os._exit(0)
    return Monitor(settings).run()
