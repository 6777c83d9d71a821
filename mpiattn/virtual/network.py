"""The links of a virtual cluster: which ports a message takes, and for how long.

A message takes the ports of its two ranks (or their nodes' network cards) in the order in which messages become
ready, and as long as the machine description says; the port that is done last counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..machine import LEVELS, Machine

INSIDE = LEVELS[:2]
"""The levels of links inside a node."""

Port = list[float]
"""When a port is free again, one number in a list."""


class Route(NamedTuple):
    """Latency, seconds per byte, the two ends, and what else is on the way with the seconds per byte it takes."""

    latency: float
    per_byte: float
    out: Port
    into: Port
    others: list[tuple[Port, float]]

    def carry(self, nbytes: int, ready: float) -> tuple[float, float]:
        """Take the ports for a message that is ready at that time; return when it has left, and when it is there."""
        latency, per_byte, out, into, others = self
        # Each port serves the messages as they become ready; one that is held up elsewhere holds up no other.
        taken = nbytes * per_byte
        end = out[0] = (out[0] if out[0] > ready else ready) + taken
        into[0] = (into[0] if into[0] > ready else ready) + taken
        if into[0] > end:
            end = into[0]
        for port, share in others:
            port[0] = max(port[0], ready) + nbytes * share
            end = max(end, port[0])
        return end, end + latency


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
        return self.ports.setdefault(key, [0.0])
