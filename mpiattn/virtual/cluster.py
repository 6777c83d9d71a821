"""A virtual cluster: ranks on a machine, each of which runs the same text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from ..machines.machine import Machine
from .clock import Agenda, Rank
from .comm import VirtualComm
from .group import Group
from .network import Network

T = TypeVar("T")


class Cluster:
    """Virtual ranks on a machine.

    Parameters
    ----------
    ranks : int
    machine : Machine
    limit : float
        Seconds after which a run ends with TimeoutError.
    """

    def __init__(self, ranks: int, machine: Machine, limit: float = math.inf) -> None:
        if ranks < 1:
            raise ValueError(f"a cluster has at least one rank, not {ranks}")
        self.network, self.agenda = Network(machine), Agenda(limit)
        self.ranks = [Rank(number, machine, self.agenda) for number in range(ranks)]

    def run(self, function: Callable[[VirtualComm], T]) -> list[T]:
        """Call a function with each rank's communicator, and return what each returned.

        Raises
        ------
        Whatever a rank raises first; RuntimeError where ranks wait for messages that nobody sends.
        """
        world = Group(self.ranks, self.network)
        results, stuck = self.agenda.run(self.ranks, lambda rank: function(VirtualComm(world, rank)))
        if stuck:
            reasons = "; ".join(f"rank {rank.number} for {reason(world, rank)}" for rank in stuck[:4])
            raise RuntimeError(f"{len(stuck)} ranks wait for ever: {reasons}")
        for request in world.waiting():
            raise RuntimeError(f"a message {request.lane} has no partner")
        return results


def reason(world: Group, rank: Rank) -> str:
    """Return in words what a rank waits for."""
    messages = [f"a message {request.lane}" for request in world.waiting() if request.rank is rank]
    return " and ".join(messages[:2]) or "a collective that not all have called"


def run(ranks: int, machine: Machine, function: Callable[[VirtualComm], T]) -> list[T]:
    """Call a function with the communicator of each rank of a new cluster, and return what each returned."""
    return Cluster(ranks, machine).run(function)
