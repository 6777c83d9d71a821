"""An algorithm without its messages: what its calls take where nothing is sent."""

from __future__ import annotations

from typing import Any

from ...algorithms import Attention, HybridAttention


class Nothing:
    """A request for a message that nobody sends."""

    @staticmethod
    def Waitall(requests: object) -> None:
        """Wait for nothing."""

    @staticmethod
    def Testall(requests: object) -> bool:
        """Say that nothing is left to wait for."""
        return True


class Quiet:
    """A communicator that moves nothing but what ranks agree on."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Isend(self, *arguments: object) -> Nothing:
        """Send nothing."""
        return Nothing()

    Irecv = Iallgatherv = Isend

    def Allgatherv(self, *arguments: object) -> None:
        """Gather nothing."""

    Alltoallv = Allgatherv

    def Create_cart(self, *arguments: object, **named: object) -> Quiet:
        """Make a communicator that moves nothing either."""
        return Quiet(self.comm.Create_cart(*arguments, **named))

    def Sub(self, *arguments: object) -> Quiet:
        """Make a communicator that moves nothing either."""
        return Quiet(self.comm.Sub(*arguments))

    def Split(self, *arguments: object) -> Quiet:
        """Make a communicator that moves nothing either."""
        return Quiet(self.comm.Split(*arguments))


def silence(attention: Attention) -> None:
    """Leave out the messages of an algorithm from now on."""
    attention.comm = Quiet(attention.comm)
    attention.connect(attention.comm)
    if isinstance(attention, HybridAttention):
        silence(attention.inner)
