"""MPI's calls: those that say how many bytes arrive from whom, that make communicators, and that do neither.

`add_calls` gives the class of a traced communicator a method for each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .buffers import even_pieces, nbytes, pieces
from .comm import TracedComm

Sizes = Callable[..., list[int]]
"""Called with the communicator and the arguments of a collective, returns how many bytes come from each rank."""


def even(comm: TracedComm, sendbuf: object, recvbuf: object) -> list[int]:
    """Return the sizes of equal pieces of all ranks."""
    return even_pieces(recvbuf, comm.Get_size())


def uneven(comm: TracedComm, sendbuf: object, recvbuf: object) -> list[int]:
    """Return the sizes of pieces of all ranks, each with a count of its own."""
    return pieces(recvbuf, comm.Get_size())


def even_on_root(comm: TracedComm, sendbuf: object, recvbuf: object, root: int = 0) -> list[int]:
    """Return the sizes of equal pieces that only the root receives."""
    return even(comm, sendbuf, recvbuf) if comm.Get_rank() == root else []


def uneven_on_root(comm: TracedComm, sendbuf: object, recvbuf: object, root: int = 0) -> list[int]:
    """Return the sizes of pieces, each with a count of its own, that only the root receives."""
    return uneven(comm, sendbuf, recvbuf) if comm.Get_rank() == root else []


def from_root(comm: TracedComm, sendbuf: object, recvbuf: object, root: int = 0) -> list[int]:
    """Return the size of the one piece that comes from the root."""
    rank, size = comm.Get_rank(), comm.Get_size()
    return [nbytes(recvbuf) if source == root != rank else 0 for source in range(size)]


def of_root(comm: TracedComm, buf: object, root: int = 0) -> list[int]:
    """Return the size of what the root has for all."""
    return from_root(comm, None, buf, root)


ARRIVING: dict[str, Sizes] = {
    "Allgather": even,
    "Allgatherv": uneven,
    "Alltoall": even,
    "Alltoallv": uneven,
    "Bcast": of_root,
    "Gather": even_on_root,
    "Gatherv": uneven_on_root,
    "Scatter": from_root,
    "Scatterv": from_root,
}
"""Collectives whose buffers say how many bytes come from each rank; with an I before them they are not blocking."""

COLLECTIVES = frozenset([*ARRIVING, *(f"I{name.lower()}" for name in ARRIVING)])
"""Names that the traffic of collectives has in a trace."""

AGREEMENTS = ("Allgather", "Bcast", "allgather", "bcast", "gather")
"""Collectives by which the ranks agree, where `Trace.agreements` says so; the last three are of objects."""

DERIVED = (
    "Dup", "Clone", "Dup_with_info", "Create", "Create_group", "Create_cart", "Sub", "Split", "Split_type", "Shrink",
)  # fmt: skip
"""Calls that return a communicator, which is traced as well."""

UNCOUNTED = (
    # Sums: the library decides what is sent to whom.
    "Reduce", "Allreduce", "Reduce_scatter", "Reduce_scatter_block", "Scan", "Exscan",
    "Ireduce", "Iallreduce", "Ireduce_scatter", "Ireduce_scatter_block", "Iscan", "Iexscan",
    # Objects, whose bytes pickle decides on.
    "send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "sendrecv", "mprobe", "improbe",
    "scatter", "alltoall", "reduce", "allreduce", "scan", "exscan", "neighbor_allgather", "neighbor_alltoall",
    # A receive elsewhere than on the communicator.
    "Mprobe", "Improbe",
    # Persistent requests, which are started elsewhere, and how often is not known.
    "Send_init", "Bsend_init", "Ssend_init", "Rsend_init", "Recv_init", "Psend_init", "Precv_init",
    "Allgather_init", "Allgatherv_init", "Allreduce_init", "Alltoall_init", "Alltoallv_init", "Alltoallw_init",
    "Bcast_init", "Exscan_init", "Gather_init", "Gatherv_init", "Reduce_init", "Reduce_scatter_init",
    "Reduce_scatter_block_init", "Scan_init", "Scatter_init", "Scatterv_init", "Neighbor_allgather_init",
    "Neighbor_allgatherv_init", "Neighbor_alltoall_init", "Neighbor_alltoallv_init", "Neighbor_alltoallw_init",
    # Rarely used with attention.
    "Alltoallw", "Ialltoallw", "Isendrecv", "Isendrecv_replace", "Neighbor_allgather", "Neighbor_allgatherv",
    "Neighbor_alltoall", "Neighbor_alltoallv", "Neighbor_alltoallw", "Ineighbor_allgather", "Ineighbor_allgatherv",
    "Ineighbor_alltoall", "Ineighbor_alltoallv", "Ineighbor_alltoallw",
    # Communicators over which messages go unseen.
    "Idup", "Idup_with_info", "Ishrink", "Create_graph", "Create_dist_graph", "Create_dist_graph_adjacent",
    "Create_intercomm", "Spawn", "Spawn_multiple", "Accept", "Connect", "Join",
)  # fmt: skip
"""Calls that move data, of which no event says how much."""


def add_calls(cls: type[TracedComm]) -> type[TracedComm]:
    """Give a class of traced communicators of MPI a method for each of the calls above that it does not have."""
    for name, sizes in ARRIVING.items():
        for call, collect in ((name, TracedComm._collective), (f"I{name.lower()}", TracedComm._start)):
            if call not in vars(TracedComm) or call in AGREEMENTS:
                setattr(cls, call, _collective(call, sizes, collect))
    for name in DERIVED:
        setattr(cls, name, _deriving(name))
    for name in (*AGREEMENTS[2:], *UNCOUNTED):
        setattr(cls, name, _uncounted(name))
    return cls


def _collective(name: str, sizes: Sizes, collect: Callable[..., object]) -> Callable[..., object]:
    """Return a method for a collective, which `collect` calls and records."""
    agreement, signature = getattr(TracedComm, name, None), inspect.signature(sizes)

    def method(self: TracedComm, *arguments: object, **named: object) -> object:
        if agreement is not None and self.trace.agreements:
            return agreement(self, *arguments, **named)
        in_order = signature.bind(self, *arguments, **named).args
        return collect(self, name, in_order[1:], sizes(*in_order))

    return _as(name, method)


def _deriving(name: str) -> Callable[..., object]:
    """Return a method for a call that makes a communicator."""

    def method(self: TracedComm, *arguments: object, **named: object) -> object:
        return self._derived(getattr(self.comm, name)(*arguments, **named))

    return _as(name, method)


def _uncounted(name: str) -> Callable[..., object]:
    """Return a method for a call of which only is noted that it was made."""
    agreement = getattr(TracedComm, name, None)

    def method(self: TracedComm, *arguments: object, **named: object) -> object:
        if agreement is not None and self.trace.agreements:
            return agreement(self, *arguments, **named)
        self.trace.uncounted[name] += 1
        return getattr(self.comm, name)(*arguments, **named)

    return _as(name, method)


def _as(name: str, method: Callable[..., object]) -> Callable[..., object]:
    method.__name__, method.__doc__ = name, f"Call `MPI.Comm.{name}`; see `mpi_calls`."
    return method
