"""The links of a virtual cluster: which ports a message takes, and for how long.

A message takes the ports of its two ranks (or their nodes' network cards) in the order in which messages become
ready, and as long as the machine description says; the port that is done last counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..machines.machine import LEVELS, Machine

INSIDE = LEVELS[:2]
"""The levels of links inside a node."""


class Port:
    """One end of a link: a rank's, or a network card's."""

    __slots__ = ("free",)

    def __init__(self) -> None:
        self.free = 0.0
        """The time, in seconds, when it has served all messages so far."""

    def serve(self, ready: float, seconds: float) -> float:
        """Serve a message that is ready at that time; return when that is done."""
        self.free = (self.free if self.free > ready else ready) + seconds
        return self.free


class Route:
    """The way of messages from one rank to another.

    Attributes
    ----------
    latency, per_byte : float
        Seconds, and seconds a byte.
    out, into : Port
        The two ends.
    others : list of (Port, float)
        What else is on the way, with the seconds per byte it takes.
    """

    __slots__ = ("into", "latency", "others", "out", "per_byte")

    def __init__(
        self, latency: float, per_byte: float, out: Port, into: Port, others: Sequence[tuple[Port, float]]
    ) -> None:
        self.latency, self.per_byte, self.out, self.into, self.others = latency, per_byte, out, into, others

    def carry(self, nbytes: int, ready: float) -> float:
        """Take the ports for a message that is ready at that time; return when it has left."""
        # Each port serves the messages as they become ready; one that is held up elsewhere holds up no other.
        taken = nbytes * self.per_byte
        out, into = self.out, self.into
        end = out.free = (out.free if out.free > ready else ready) + taken
        into.free = (into.free if into.free > ready else ready) + taken
        if into.free > end:
            end = into.free
        for port, per_byte in self.others:
            end = max(end, port.serve(ready, nbytes * per_byte))
        return end


class Network:
    """The ports of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ports: dict[object, Port] = {}

    def route(self, source: int, dest: int) -> Route:
        """Return the way of messages from one rank to another."""
        machine = self.machine
        level = machine.level(source, dest)
        link = machine.links[level]
        own: list[Port] = []
        others: list[tuple[Port, float]] = []
        for rank, way in ((source, "out"), (dest, "in")):
            node, local = divmod(rank, machine.ranks_per_node)
            way = way if machine.duplex else "both"
            if link.cards:
                own.append(self._port("card", way, node, local * link.cards // machine.ranks_per_node))
            else:
                own.append(self._port(level in INSIDE, way, rank))
            if math.isfinite(link.shared) and (rank == source or level not in INSIDE):
                others.append((self._port("shared", level, way, node), 1 / link.shared))
        return Route(link.latency, 1 / link.bandwidth, own[0], own[1], others)

    def _port(self, *key: object) -> Port:
        return self.ports.setdefault(key, Port())
