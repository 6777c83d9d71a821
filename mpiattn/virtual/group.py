"""State that the communicators of several ranks share: the ranks, their lanes, their collective calls and the costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..machines.machine import LEVELS
from .clock import Rank
from .messages import Lane, VirtualRequest
from .network import INSIDE, Network


class Meeting:
    """One collective call: what each rank brought, and what comes of it."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.values: list[Any] = [None] * size
        self.requests: list[VirtualRequest] = []
        self.result: Any = None


class Group:
    """Ranks in the order of a communicator."""

    def __init__(self, ranks: Sequence[Rank], network: Network) -> None:
        self.ranks, self.network = ranks, network
        self.place = {rank.number: place for place, rank in enumerate(ranks)}
        self.lanes: dict[tuple[int, int, int], Lane] = {}
        self.meetings: dict[int, Meeting] = {}
        self.children: dict[object, Group] = {}

    def child(self, key: object, places: Sequence[int]) -> Group:
        """Return a group of some of the ranks; all its members ask for the same key."""
        if key not in self.children:
            self.children[key] = Group([self.ranks[place] for place in places], self.network)
        return self.children[key]

    def lane(self, source: int, dest: int, tag: int) -> Lane:
        """Return the lane from one place to another; both ask for the same one."""
        key = source, dest, tag
        if key not in self.lanes:
            sender, receiver = self.ranks[source], self.ranks[dest]
            self.lanes[key] = Lane(key, self.network.route(sender.number, receiver.number), sender)
        return self.lanes[key]

    def waiting(self) -> Iterator[VirtualRequest]:
        """Return the messages without a partner, those of the groups made from this one included."""
        for lane in self.lanes.values():
            yield from lane.sent + lane.received
        for child in self.children.values():
            yield from child.waiting()

    def seconds(self, rounds: float, nbytes: float, pairwise: bool = False) -> float:
        """Return the time of a collective: so many messages one after the other, so many bytes into a rank.

        Round a ring, one rank of a node at a time receives from another node. Pairwise, all do at once. The node's
        other ranks are taken to be in other groups that do the same.
        """
        machine, first = self.network.machine, self.ranks[0].number
        if len(self.ranks) == 1:
            return 0.0
        levels = [machine.level(first, other.number) for other in self.ranks[1:]]
        slowest = max(set(levels), key=LEVELS.index)
        near = 1 + sum(level in INSIDE for level in levels)
        link, seconds = machine.links[slowest], 0.0
        for level in set(levels) if pairwise else {slowest}:
            part = nbytes * levels.count(level) / len(levels) if pairwise else nbytes
            one_by_one = not pairwise and level not in INSIDE
            crossing = max(machine.ranks_per_node / near, 1) if one_by_one else machine.ranks_per_node
            seconds = max(seconds, part * machine.links[level].per_byte(crossing))
        return rounds * (link.latency + machine.overhead) + seconds

    @property
    def depth(self) -> int:
        """Rounds of a binomial tree."""
        return (len(self.ranks) - 1).bit_length()
