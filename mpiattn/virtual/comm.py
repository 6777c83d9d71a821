"""The communicator of a virtual rank, with mpi4py's methods: its messages, its grids, and those made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kernels.contract import Kernel
from .clock import Rank
from .collectives import Collectives
from .group import Group
from .kernel import ClockedKernel, VirtualKernel
from .messages import Lane, VirtualRequest

NOBODY = -1
"""The rank beyond the edge of a grid that does not wrap around: messages to it and from it are done at once."""


class VirtualComm(Collectives):
    """A communicator of virtual ranks; made by `Cluster.run` and by its own methods."""

    def __init__(self, group: Group, rank: Rank, dims: Sequence[int] = (), periods: Sequence[bool] = ()) -> None:
        super().__init__(group, rank)
        self.dims, self.periods = list(dims), list(periods)
        self.children = 0
        self.outgoing: dict[int, Lane] = {}
        self.incoming: dict[int, Lane] = {}

    # What is handed to an algorithm that is built on it

    def private(self) -> VirtualComm:
        """Return a communicator of the same ranks with messages of its own; see `connection.private`."""
        return self._child("private", range(self.Get_size()))

    def kernel(self, kernel: Kernel | None) -> Kernel:
        """Return what moves the clock, and computes where there is anything to compute; see `connection.kernel_on`."""
        return VirtualKernel() if kernel is None else ClockedKernel(kernel, VirtualKernel())

    # Messages

    def Isend(self, buf: object, dest: int, tag: int = 0) -> VirtualRequest:
        """Start to send a buffer."""
        if dest == NOBODY:
            return self._nothing()
        lane = self.outgoing.get((dest << 32) + tag)
        if lane is None:
            lane = self.outgoing[(dest << 32) + tag] = self.group.lane(self.place, dest, int(tag))
        return self._post(buf, lane, lane.send)

    def Irecv(self, buf: object, source: int, tag: int = 0) -> VirtualRequest:
        """Start to receive into a buffer."""
        if source == NOBODY:
            return self._nothing()
        lane = self.incoming.get((source << 32) + tag)
        if lane is None:
            lane = self.incoming[(source << 32) + tag] = self.group.lane(source, self.place, int(tag))
        return self._post(buf, lane, lane.receive)

    def _post(self, buf: object, lane: Lane, take: Callable[[VirtualRequest], None]) -> VirtualRequest:
        """Give a lane a message to take: now, or where MPI works only while it is called, then."""
        rank = self.me
        rank.clock += rank.overhead
        request = VirtualRequest(rank, lane, buf[0] if type(buf) is list else buf)
        if rank.progress:
            take(request)
        else:
            rank.pending.append((request, take))
        return request

    def _nothing(self) -> VirtualRequest:
        self.me.clock += self.me.overhead
        request = VirtualRequest(self.me)
        request.done = request.posted
        return request

    # Topology

    def _child(self, color: object, places: Sequence[int], **cart: Any) -> VirtualComm:
        """Return the next communicator made from this one, shared by the ranks of one color."""
        self.children += 1
        return VirtualComm(self.group.child((self.children, color), places), self.me, **cart)

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = False) -> VirtualComm:
        """Make a Cartesian communicator of all ranks; they keep their order."""
        if math.prod(dims) != self.Get_size():
            raise ValueError(f"a grid of {list(dims)} does not hold {self.Get_size()} ranks")
        return self._child("cart", range(self.Get_size()), dims=dims, periods=periods)

    def Sub(self, remain_dims: Sequence[bool]) -> VirtualComm:
        """Make the communicator of a row or a column of a grid."""
        coords = self.Get_coords(self.place)
        places = np.arange(self.Get_size()).reshape(self.dims)
        where = tuple(slice(None) if remain else coord for remain, coord in zip(remain_dims, coords, strict=True))
        kept = [axis for axis, remain in enumerate(remain_dims) if remain]
        color = tuple(coord for coord, remain in zip(coords, remain_dims, strict=True) if not remain)
        cart = {"dims": [self.dims[axis] for axis in kept], "periods": [self.periods[axis] for axis in kept]}
        return self._child(color, places[where].reshape(-1).tolist(), **cart)

    def Get_coords(self, rank: int) -> list[int]:
        """Return a rank's coordinates in a grid."""
        return [int(coord) for coord in np.unravel_index(rank, self.dims)]

    def Get_cart_rank(self, coords: Sequence[int]) -> int:
        """Return the rank at coordinates of a grid, which wrap around."""
        return int(np.ravel_multi_index(tuple(coords), self.dims, mode="wrap"))

    def Shift(self, direction: int, disp: int) -> tuple[int, int]:
        """Return (source, dest) along a dimension of a grid."""
        coords, size = self.Get_coords(self.place), self.dims[direction]
        found = []
        for step in (-disp, disp):
            coord = coords[direction] + step
            inside = self.periods[direction] or 0 <= coord < size
            moved = [*coords[:direction], coord % size, *coords[direction + 1 :]]
            found.append(self.Get_cart_rank(moved) if inside else NOBODY)
        return found[0], found[1]

    def Split(self, color: int = 0, key: int = 0) -> VirtualComm:
        """Make a communicator of the ranks of the same color, in the order of their keys."""
        brought = self.allgather((color, key))
        members = sorted((theirs, place) for place, (other, theirs) in enumerate(brought) if other == color)
        return self._child(color, [place for _, place in members])

    def Split_type(self, split_type: int = 0, key: int = 0) -> VirtualComm:
        """Make a communicator of the ranks of this rank's node."""
        return self.Split(self.me.number // self.me.machine.ranks_per_node, key)

    def Free(self) -> None:
        """Do nothing: a virtual communicator holds nothing."""
