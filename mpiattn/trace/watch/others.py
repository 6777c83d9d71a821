"""The watches of the other hosts, as that of rank 0's host sees them."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from selectors import EVENT_READ, BaseSelector
from typing import Any

from .alarm import Alarm, Kind
from .ended import shift
from .network import Connection
from .state import Doing

BEAT = 1.0  # seconds between two signs of life from host to host
PATIENCE = 2.0  # seconds for an answer of another host, which has its ranks show where they are


@dataclass
class Other:
    """The watch of another host.

    Attributes
    ----------
    name : str
        Nothing before it has shown the secret.
    heard : float
        When it said something last.
    left : bool
        Its ranks have come to the end of the block.
    offset : float
        Seconds to add to its clock to get this host's, best known from the fastest answer.
    sent : float
        When it was asked what its ranks do.
    lost : dict
        When it was heard that one of its ranks is gone.
    """

    connection: Connection
    heard: float
    name: str = ""
    ranks: list[int] = field(default_factory=list)
    left: bool = False
    asked: float = 0.0
    fastest: float = float("inf")
    offset: float = 0.0
    sent: float = 0.0
    doing: list[Doing] | None = None
    lost: dict[int, float] = field(default_factory=dict)

    def clock(self, theirs: float) -> None:
        """Take in what its clock shows (Cristian 1989, Probabilistic clock synchronization)."""
        if self.heard - self.asked < self.fastest:
            self.fastest = self.heard - self.asked
            self.offset = (self.heard + self.asked) / 2 - theirs


class Others:
    """The watches of the other hosts.

    Parameters
    ----------
    selector : selectors.BaseSelector
        Whose data are functions to call, which return what is wrong.
    listener : socket
        Where they call.
    expected : int
        How many there are.
    secret : str
        That they know.
    seconds : float
        Without a word, after which something is wrong.
    """

    def __init__(
        self, selector: BaseSelector, listener: socket.socket, expected: int, secret: str, seconds: float
    ) -> None:
        self.selector, self.listener, self.expected, self.secret = selector, listener, expected, secret
        self.seconds, self.beaten = seconds, 0.0
        self.all: list[Other] = []
        selector.register(listener, EVENT_READ, self.accept)

    @property
    def known(self) -> list[Other]:
        """Processes of other ranks that can be spoken to."""
        return [other for other in self.all if other.name and not other.left and not other.connection.lost]

    @property
    def done(self) -> bool:
        """Whether all ranks of all of them have come to the end of the block."""
        return sum(other.left for other in self.all) == self.expected

    @property
    def offsets(self) -> dict[str, float]:
        """Seconds to add to the clock of each host."""
        return {other.name: other.offset for other in self.all}

    def accept(self) -> None:
        """Let another host in."""
        opened, _ = self.listener.accept()
        other = Other(Connection(opened), time.monotonic())
        self.all.append(other)
        self.selector.register(opened, EVENT_READ, lambda: self.hear(other))

    def hear(self, other: Other) -> Alarm | None:
        """Take in what another host says; return what is wrong there."""
        wrong = None
        for line in other.connection.lines():
            if not other.name and line.get("secret") != self.secret:
                other.connection.lost = True
                break
            other.heard = time.monotonic()
            wrong = self.take(other, line) or wrong
        if other.connection.lost:
            self.selector.unregister(other.connection.socket)
            other.connection.socket.close()
            if other.name and not other.left:
                return Alarm(Kind.UNWATCHED, f"the watch on {other.name} is gone")
        return wrong

    def take(self, other: Other, line: Mapping[str, Any]) -> Alarm | None:
        """Take in a line of another host; return what is wrong there."""
        if "secret" in line:
            other.name, other.ranks = line["name"], line["ranks"]
        if "clock" in line:
            other.clock(line["clock"])
        if "doing" in line and line["sent"] == other.sent:  # else an answer that came too late, to an earlier question
            given = [Doing.of_json(doing) for doing in line["doing"]]
            other.doing = [shift(doing, other.sent, line["asked"], line["said"], other.heard) for doing in given]
            for doing in other.doing:
                doing.ill = min(doing.ill, other.lost.get(doing.rank, doing.ill))
        for rank in line.get("gone", ()):
            other.lost.setdefault(rank, other.heard)
        other.left = other.left or "bye" in line
        if "wrong" not in line:
            return None
        kind, text = line["wrong"]
        return Alarm(Kind(kind), text)

    def beat(self) -> Alarm | None:
        """Give signs of life from time to time; return whose are missed."""
        now = time.monotonic()
        if now - self.beaten < BEAT:
            return None
        self.beaten = now
        for other in self.known:
            other.asked = time.monotonic()
            other.connection.send(ask="clock")
        silent = [other.name for other in self.known if now - other.heard > self.seconds + BEAT]
        return Alarm(Kind.SILENT, f"no word from {', '.join(silent)} for {self.seconds:g} s") if silent else None

    def ask(self) -> list[Other]:
        """Ask the other hosts what their ranks do; return those asked."""
        asked = self.known
        for other in asked:
            other.doing, other.sent = None, time.monotonic()
            other.connection.send(ask="doing", sent=other.sent)
        return asked

    def gather(self, asked: list[Other]) -> list[Doing]:
        """Return what the ranks of those hosts do that answer in time."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(other.doing is None for other in asked if not other.connection.lost):
            for key, _ in self.selector.select(0.1):
                if any(key.fileobj is other.connection.socket for other in asked):
                    key.data()
                else:
                    time.sleep(0.01)  # a rank that has ended, which is told again at once
        return [doing for other in asked for doing in other.doing or ()]

    def end(self) -> None:
        """Have them end their ranks."""
        for other in self.known:
            other.connection.send(ask="end")
