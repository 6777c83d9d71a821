"""The events of one rank: messages, waits, blocks, agreements, phases."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..messages import message
from ..messages.message import Tag


@dataclass
class Event:
    """One message, wait, block or phase of one rank; times in seconds of `message.clock`.

    Attributes
    ----------
    kind : {"send", "receive", "wait", "agree", "compute", "phase"}
    name : str
        The tag's name, for messages; forward or backward, for blocks.
    peer : int
        The other rank, in the communicator that was traced first; -1 where there is none, or none is known yet.
    nbytes : int
    start, end : float
        From the call that posted it to the call that found it complete; end is not a number before, nor where no
        traced call does, as `MPI.Request.Waitall`.
    block : (int, int), optional
        First global position of a block's queries and of its keys.
    sizes : (int, int), optional
        How many queries and keys the block has.
    owners : (int, int), optional
        The ranks whose queries and whose keys they are.
    """

    kind: str
    name: str
    peer: int
    nbytes: int
    start: float
    end: float = float("nan")
    block: tuple[int, int] | None = None
    sizes: tuple[int, int] | None = None
    owners: tuple[int, int] | None = None


Flow = tuple[int, Event, int, Event]
"""Source, send, dest and receive of a message."""


@dataclass
class Trace:
    """The events of one rank, in the order in which they began.

    Attributes
    ----------
    events : list of Event
    agreements : bool
        Whether `Allgather`, `Bcast` and their like are taken for the agreement of the ranks on their input, as in
        this package's algorithms, and not for traffic.
    uncounted : Counter
        Calls, by name, that moved data that is in no event.
    """

    events: list[Event] = field(default_factory=list)
    agreements: bool = True
    uncounted: Counter[str] = field(default_factory=Counter)

    def received(self) -> tuple[int, int]:
        """Return the number of messages received and their bytes."""
        sizes = [event.nbytes for event in self.events if event.kind == "receive"]
        return len(sizes), sum(sizes)

    def unseen(self) -> int:
        """Return how many messages no traced call found complete; nobody knows how long they were waited for."""
        return sum(event.kind in ("send", "receive") and event.end != event.end for event in self.events)

    def waited(self) -> float:
        """Return the seconds spent in waits for messages, but for those that are `unseen`."""
        return self.spent("wait")

    def spent(self, kind: str) -> float:
        """Return the seconds of all events of a kind."""
        return sum(event.end - event.start for event in self.events if event.kind == kind)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give a name to the time of a with block, such as the forward pass of one algorithm."""
        event = Event("phase", name, -1, 0, message.clock())
        self.events.append(event)
        yield
        event.end = message.clock()

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()
        self.uncounted.clear()


def label(tag: int) -> str:
    """Return the name of a tag in traces: what it carries, where it is one of this package's."""
    return tag._name_ if type(tag) is Tag else f"tag {tag}"
