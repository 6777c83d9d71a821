"""Point-to-point messages in virtual time: from post to completion.

A message leaves when both its send and its receive are posted; a small one leaves at once. Where the machine's
MPI makes no progress while a rank computes, a post only counts from the rank's next wait or test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from .clock import POLL, Rank
from .network import Route

LONGEST_POLL = 1e-3
"""Seconds: each look in vain at the state of messages takes twice as long as the one before, so that polling ends."""

UNKNOWN = math.inf
"""The time of an end that nobody can tell yet."""


class VirtualRequest:
    """A message that a rank has posted, a send or a receive, or its part in a collective.

    Attributes
    ----------
    rank : Rank
    lane : Lane or None
    buffer : array or None
    posted, done : float
        Seconds.
    waited : bool
        Whether its rank waits for it.
    partner : VirtualRequest or None
        Of a send: the receive that takes it.
    arrived : float
        Of a send: when its last byte is there.
    """

    __slots__ = ("arrived", "buffer", "done", "lane", "partner", "posted", "rank", "waited")

    def __init__(self, rank: Rank, lane: Lane | None = None, buffer: Any = None) -> None:
        self.rank = rank
        self.lane = lane
        self.buffer = buffer
        self.posted = rank.clock
        self.done = self.arrived = UNKNOWN
        self.waited = False
        self.partner: VirtualRequest | None = None

    @staticmethod
    def Waitall(requests: Sequence[VirtualRequest]) -> None:
        """Move the rank's clock to where every request is complete."""
        rank = requests[0].rank
        if rank.pending:
            hand_over(rank)
        start = latest = rank.clock
        missing, unknown = 0, UNKNOWN
        for request in requests:
            if request.done == unknown:
                request.waited = True
                missing += 1
            elif request.done > latest:
                latest = request.done
        rank.poll = POLL
        if missing:
            rank.missing, rank.latest = missing, latest
            rank.agenda.hub.switch()
        else:
            rank.clock = latest
        rank.waiting += rank.clock - start

    @staticmethod
    def Testall(requests: Sequence[VirtualRequest]) -> bool:
        """Let messages travel up to now, and say if all requests are complete."""
        rank = requests[0].rank
        rank.clock += rank.poll
        hand_over(rank)
        rank.pause()
        done = all(request.done <= rank.clock for request in requests)
        rank.poll = POLL if done else min(2 * rank.poll, LONGEST_POLL)
        return done

    def Wait(self) -> None:
        """Wait until this request is complete."""
        self.Waitall([self])

    def Test(self) -> bool:
        """Say if this request is complete."""
        return self.Testall([self])

    def complete(self, time: float) -> None:
        """Set when it is complete; the rank that waits for it, and for nothing else, goes on then."""
        self.done = time
        if self.waited:
            rank = self.rank
            self.waited = False
            rank.missing -= 1
            if time > rank.latest:
                rank.latest = time
            if not rank.missing:
                rank.agenda.put(rank.latest, rank)

    def happen(self, time: float) -> None:
        """Leave, as a send that is ready at that time."""
        assert self.lane is not None
        route = self.lane.route
        left = route.carry(self.buffer.nbytes, time)
        self.arrived = left + route.latency
        if self.partner is not None:
            self.deliver(self.partner)
        if self.done == UNKNOWN:
            self.complete(left)

    def deliver(self, receive: VirtualRequest) -> None:
        """Complete the receive of a send."""
        nbytes = self.buffer.nbytes
        if receive.buffer.nbytes < nbytes:
            raise ValueError(
                f"rank {receive.rank.number} receives {receive.buffer.nbytes} bytes from rank {self.rank.number}, "
                f"which sends {nbytes}"
            )
        copy(self.buffer, receive.buffer)
        receive.rank.received += nbytes
        receive.complete(self.arrived if self.arrived > receive.posted else receive.posted)


class Lane:
    """The messages of one tag from one rank to another, which arrive in the order in which they are sent.

    Parameters
    ----------
    name : (int, int, int)
        Source, destination and tag, as their communicator numbers them.
    route : Route
    sender : Rank
    """

    __slots__ = ("agenda", "eager", "name", "received", "route", "sent")

    def __init__(self, name: tuple[int, int, int], route: Route, sender: Rank) -> None:
        self.name, self.route = name, route
        self.agenda, self.eager = sender.agenda, sender.machine.eager
        # Without a partner: there are never both.
        self.sent: list[VirtualRequest] = []
        self.received: list[VirtualRequest] = []

    def __str__(self) -> str:
        source, dest, tag = self.name
        return f"from rank {source} to rank {dest} with tag {tag}"

    def send(self, request: VirtualRequest) -> None:
        """Take a send; it is on its way as soon as its receive is posted, or now."""
        if request.buffer.nbytes < self.eager:
            request.buffer = request.buffer.copy()
            request.complete(request.posted)
            self.agenda.put(request.posted, request)
        if self.received:
            self.pair(request, self.received.pop(0))
        else:
            self.sent.append(request)

    def receive(self, request: VirtualRequest) -> None:
        """Take a receive."""
        if self.sent:
            self.pair(self.sent.pop(0), request)
        else:
            self.received.append(request)

    def pair(self, send: VirtualRequest, receive: VirtualRequest) -> None:
        """Bring a send and its receive together; the message is ready when both are posted."""
        send.partner = receive
        if send.done == UNKNOWN:
            self.agenda.put(send.posted if send.posted > receive.posted else receive.posted, send)
        elif send.arrived != UNKNOWN:
            send.deliver(receive)


def hand_over(rank: Rank) -> None:
    """Hand a rank's messages to an MPI library that works only while it is called."""
    for request, take in rank.pending:
        request.posted = rank.clock
        take(request)
    rank.pending.clear()


def copy(source: Array, target: Array) -> None:
    """Move the bytes of a message, if it has any."""
    if isinstance(source, np.ndarray):
        data = source.reshape(-1).view(np.uint8)
        target.reshape(-1).view(np.uint8)[: len(data)] = data
