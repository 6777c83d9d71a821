"""Messages of ranks that outlive each other: a send is not waited for, but looked at until it is complete.

When a communicator is revoked, Open MPI's calls that wait give up its sends, and free them. If the receiver takes such
a message after all, Open MPI 5.0.11 ends the job ("Send error after request freed"). `Get_status` gives up nothing: a
send that will not complete is left to itself, with its memory, and the error raised here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from . import connection, message


class SurvivingRequest:
    """A request to a communicator on which ranks may be lost."""

    def __init__(self, request: MPI.Request, comm: MPI.Intracomm, sent: bool) -> None:
        self.request, self.comm, self.sent = request, comm, sent

    def complete(self) -> bool:
        """Say whether a send is complete; raise MPI's error where it may never be."""
        if self.request.Get_status():
            return True
        if self.comm.Is_revoked():
            raise MPI.Exception(MPI.ERR_REVOKED)
        failed = self.comm.Get_failed()
        lost = failed.size
        failed.Free()
        if lost:
            raise MPI.Exception(MPI.ERR_PROC_FAILED)
        return False

    @staticmethod
    def Waitall(requests: Sequence[SurvivingRequest]) -> None:
        """Wait for what is to be received, then until what is sent has left."""
        received, sent = parted(requests)
        message.Waitall(received)
        for request in sent:
            while not request.complete():
                pass
        message.Waitall([request.request for request in sent])

    @staticmethod
    def Testall(requests: Sequence[SurvivingRequest]) -> bool:
        """Let messages progress, and say if all are complete."""
        received, sent = parted(requests)
        left = [request.complete() for request in sent]
        return message.Testall(received) and all(left) and message.Testall([request.request for request in sent])


def parted(requests: Sequence[SurvivingRequest]) -> tuple[list[MPI.Request], list[SurvivingRequest]]:
    """Return the receives among requests, for MPI to wait for, and the sends."""
    received = [request.request for request in requests if not request.sent]
    return received, [request for request in requests if request.sent]


class SurvivingComm:
    """A communicator on which ranks may be lost, with the methods of the given one."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Isend(self, buf: object, dest: int, tag: int = 0) -> SurvivingRequest:
        """Start to send a buffer."""
        return SurvivingRequest(self.comm.Isend(buf, dest, tag), self.comm, sent=True)

    def Irecv(self, buf: object, source: int, tag: int = 0) -> SurvivingRequest:
        """Start to receive into a buffer."""
        return SurvivingRequest(self.comm.Irecv(buf, source, tag), self.comm, sent=False)

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = False) -> SurvivingComm:
        """Make a Cartesian communicator."""
        return SurvivingComm(self.comm.Create_cart(dims, periods, reorder))

    def Sub(self, remain_dims: Sequence[bool]) -> SurvivingComm:
        """Make the communicator of a row or a column of a grid."""
        return SurvivingComm(self.comm.Sub(remain_dims))

    def Split(self, color: int = 0, key: int = 0) -> SurvivingComm:
        """Make a communicator of the ranks of one color."""
        return SurvivingComm(self.comm.Split(color, key))

    def private(self) -> SurvivingComm:
        """Return the private duplicate, see `connection.private`."""
        inner = connection.private(self.comm)
        return self if inner is self.comm else SurvivingComm(inner)
