"""Virtual time: ranks that are greenlets with a clock, and the events that make them go on.

A rank runs until it has to wait. What it does on its way puts events on the agenda, each at a time; the earliest
is always next, and those of one time come in the order in which they were put there. So the outcome is the same
in every run.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import greenlet

from ..machines.machine import Machine

_running: list[Rank] = []
"""The rank that runs now, last; empty outside of a virtual cluster."""

POLL = 1e-7
"""Seconds that a first look at the state of messages takes."""

T = TypeVar("T")


def now() -> float | None:
    """Return the seconds on the clock of the rank that runs; None where none does."""
    return _running[-1].clock if _running else None


def current() -> Rank:
    """Return the rank whose text is running."""
    if not _running:
        raise RuntimeError("arrays without data live on a virtual cluster: call this from a function given to run()")
    return _running[-1]


class Rank:
    """One virtual process: a clock, what it holds of memory, and what it waits for.

    Attributes
    ----------
    number : int
    clock : float
        Seconds.
    computed, waiting : float
        Seconds that it has spent in the kernel, and in waits for messages.
    received : int
        Bytes from other ranks.
    held, peak : int
        Bytes of the arrays without data that it holds now, and the most that it has held.
    """

    __slots__ = (
        "agenda",
        "bandwidth",
        "clock",
        "computed",
        "greenlet",
        "held",
        "latest",
        "launch",
        "machine",
        "missing",
        "number",
        "overhead",
        "peak",
        "pending",
        "poll",
        "progress",
        "received",
        "waiting",
    )

    def __init__(self, number: int, machine: Machine, agenda: Agenda) -> None:
        self.number, self.machine, self.agenda = number, machine, agenda
        self.overhead, self.progress = machine.overhead, machine.progress
        self.bandwidth, self.launch = machine.memory_bandwidth, machine.launch
        self.clock = self.computed = self.waiting = 0.0
        self.held = self.peak = self.received = 0
        # Of the wait it is in: how many messages aren't complete, and when the last of the others was.
        self.missing, self.latest = 0, 0.0
        self.poll = POLL
        self.pending: list[Any] = []  # messages that an MPI library will only see when it is called
        self.greenlet: Any = None

    def compute(self, seconds: float) -> None:
        """Spend time at work."""
        self.clock += seconds
        self.computed += seconds

    def touch(self, nbytes: float) -> None:
        """Spend the time that a pass over memory takes, which moves so many bytes."""
        seconds = nbytes / self.bandwidth
        self.clock += seconds if seconds > self.launch else self.launch

    def allocate(self, nbytes: int) -> None:
        """Count memory that this rank holds."""
        self.held += nbytes
        if self.held > self.peak:
            self.peak = self.held

    def pause(self) -> None:
        """Let everything happen that comes before this rank's clock."""
        self.agenda.put(self.clock, self)
        self.agenda.hub.switch()

    def happen(self, time: float) -> None:
        """Go on at that time."""
        self.clock = time
        _running[-1] = self
        self.greenlet.switch()


class Due(Protocol):
    """An entry of the agenda."""

    def happen(self, time: float) -> None:
        """Do what is due at that time, in seconds."""


class Agenda:
    """Events in the order of time.

    Parameters
    ----------
    limit : float
        Seconds after which a run ends with TimeoutError.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.times: list[float] = []  # a heap of those at which something is due
        self.due: dict[float, list[Due]] = {}
        self.hub: Any = None
        """The greenlet that takes the events: a rank that has to wait switches to it."""

    def put(self, time: float, event: Due) -> None:
        """Put an event in its place."""
        due = self.due.get(time)
        if due is None:
            self.due[time] = [event]
            heapq.heappush(self.times, time)
        else:
            due.append(event)

    def run(self, ranks: Sequence[Rank], function: Callable[[Rank], T]) -> tuple[list[T], list[Rank]]:
        """Call a function with each rank; return what each returned, and the ranks that wait for ever.

        Raises
        ------
        Whatever a rank raises first; TimeoutError.
        """
        results: list[Any] = [None] * len(ranks)
        failed: list[BaseException] = []

        def start(rank: Rank) -> None:
            try:
                results[rank.number] = function(rank)
            except greenlet.GreenletExit:
                pass  # another rank has failed
            except BaseException as error:  # whoever called run gets it
                failed.append(error)

        self.hub = greenlet.getcurrent()
        for rank in ranks:
            rank.greenlet = greenlet.greenlet(functools.partial(start, rank))
            self.put(rank.clock, rank)
        _running.append(ranks[0])
        try:
            self._take(failed)
            stuck = [rank for rank in ranks if not rank.greenlet.dead]
            for rank in stuck:
                _running[-1] = rank
                rank.greenlet.throw(greenlet.GreenletExit)
        finally:
            _running.pop()
            self.times.clear()
            self.due.clear()
        if failed:
            raise failed[0]
        return results, stuck

    def _take(self, failed: Sequence[BaseException]) -> None:
        """Take the earliest event, until none is left or a rank has failed."""
        while self.times and not failed:
            time = heapq.heappop(self.times)
            if time > self.limit:
                raise TimeoutError(f"not done after {self.limit:g} s")
            for event in self.due[time]:  # among them those that are put there meanwhile
                event.happen(time)
                if failed:
                    break
            del self.due[time]
